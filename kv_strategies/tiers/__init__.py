"""What is not on the device: host memory, disk, files, and the ways there."""
