"""What a forward is made of: the plan, the memory of the blocks, the layers, graphs, requests and sampling."""
