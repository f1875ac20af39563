"use strict";
// What the page does where JavaScript runs: filter, sort, draw, replay. All figures stand in the page.
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const LIMIT = "limit of the machine";
const unique = (items) => [...new Set(items)];

// --- filters

const filters = [...document.querySelectorAll("[data-filter]")];
const chosen = () => filters.filter((f) => f.value).map((f) => [f.dataset.filter, f.value]);

// The choices that leave something: what nobody measured there is shown of another model, then of another machine.
function relaxed(fits) {
  for (const dropped of [[], ["model"], ["model", "machine"]]) {
    const left = chosen().filter(([key]) => !dropped.includes(key));
    if (fits(left)) return left;
  }
  return chosen();
}

function filterTables() {
  let shown = 0, all = 0;
  for (const table of document.querySelectorAll("table")) {
    const rows = [...table.tBodies[0].rows];
    const matches = (row, wanted) => wanted.every(([key, value]) => row.dataset[key] === value);
    const wanted = relaxed((left) => rows.some((row) => matches(row, left)));
    for (const row of rows) row.hidden = !matches(row, wanted);
    shown += rows.filter((row) => !row.hidden).length;
    all += rows.length;
  }
  document.getElementById("shown").textContent = `${shown} of ${all} rows`;
}

function apply() {
  filterTables();
  draw();
}

// --- tables

const number = (text) => parseFloat(text.replace(/[ ,]/g, ""));

function sort(button) {
  const th = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
  const column = th.cellIndex, down = th.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", down ? "descending" : "ascending");
  const text = (row) => row.cells[column].textContent;
  const numeric = [...body.rows].some((row) => !isNaN(number(text(row)))) && [...body.rows].every(
    (row) => !isNaN(number(text(row))) || !/^\w/.test(text(row)) || /^(failed|not run|out of)/.test(text(row)));
  const compare = (a, b) => {
    if (!numeric) return text(a).localeCompare(text(b));
    const x = number(text(a)), y = number(text(b));
    return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : x - y;
  };
  const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(a, b));
  if (numeric && down) rows.sort((a, b) => isNaN(number(text(a))) - isNaN(number(text(b)))); // what is none comes last
  body.append(...rows);
}

// --- plots

function theme() {
  const text = dark.matches ? "#e6e8eb" : "#1c1e21", soft = dark.matches ? "#a0a7b0" : "#5b6169";
  const grid = dark.matches ? "#2c3038" : "#e6e8ec";
  return {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: "transparent" },
    axis: { labelColor: soft, titleColor: soft, gridColor: grid, domainColor: soft, tickColor: soft, titleFontWeight: "normal" },
    legend: { labelColor: text, titleColor: soft, symbolOpacity: 1, symbolBaseFillColor: soft, symbolBaseStrokeColor: soft },
  };
}

async function draw() {
  for (const [name, spec] of Object.entries(data.charts)) {
    const figure = document.getElementById(`plot-${name}`), plot = figure.querySelector(".plot");
    const rowsOf = (wanted) => spec.data.values.filter((row) => wanted.every(([key, value]) =>
      row[key] === value || (row.system === LIMIT && (key === "system" || key === "workload"))));
    const wanted = relaxed((left) => rowsOf(left).some((row) => row.system !== LIMIT)), rows = rowsOf(wanted);
    const places = unique(rows.map((row) => `${row.model} on ${row.machine}`));
    figure.querySelector(".of").textContent = wanted.length < chosen().length ? `Not measured there: of ${places.join("; ")}.` : "";
    const systems = unique(rows.map((row) => row.system)).filter((system) => system !== LIMIT);
    figure.classList.toggle("empty", !systems.length);
    figure.dataset.rows = rows.length;
    if (!systems.length) continue;
    const columns = Math.max(2, Math.floor(plot.clientWidth / 140));
    const config = { ...theme(), range: { category: systems.map((system) => data.colours[system]) } };
    const shown = structuredClone({ ...spec, data: { values: rows } });
    for (const layer of [shown, ...(shown.layer ?? [])]) {
      const legend = layer.encoding?.color?.legend;
      if (legend) legend.columns = columns;
    }
    const tooltip = { theme: dark.matches ? "dark" : "light" };
    await vegaEmbed(plot, shown, { actions: false, renderer: "svg", config, tooltip });
    figure.dataset.drawn = systems.length;
  }
  document.body.dataset.drawn = String(Number(document.body.dataset.drawn ?? 0) + 1);
}

// --- the block tables

function player() {
  const system = document.getElementById("replay-system"), step = document.getElementById("step");
  const play = document.getElementById("play"), grid = document.getElementById("grid");
  const palette = Object.values(data.colours);
  let timer = null;
  const colour = (owner) =>
    owner === "." ? "" : owner === "-" ? "#8e8e8e" : owner === "*" ? "#444" : palette[(owner.charCodeAt(0) - 65) % palette.length];
  function show() {
    const run = data.replays[system.value], now = Number(step.value), blocks = run.blocks[now];
    grid.replaceChildren(...[...blocks].map((owner) => {
      const square = document.createElement("i");
      square.textContent = owner === "." ? "" : owner;
      square.style.background = colour(owner);
      return square;
    }));
    const used = [...blocks].filter((owner) => owner !== "." && owner !== "-").length;
    document.getElementById("moment").textContent =
      `${run.seconds[now].toFixed(2)} s: ${used} of ${blocks.length} blocks of ${run.block_size} tokens in use, ` +
      `${(used * run.bytes_per_block / 1e6).toFixed(2)} MB; ${run.num_preemptions} preemptions in all`;
  }
  function choose() {
    step.max = data.replays[system.value].blocks.length - 1;
    step.value = Math.floor(step.max / 2);
    show();
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "play";
  }
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (step.value === step.max) step.value = 0;
    play.textContent = "stop";
    timer = setInterval(() => {
      step.value = Number(step.value) + 1;
      show();
      if (step.value === step.max) stop();
    }, 150);
  });
  system.append(...Object.keys(data.replays).map((name) => new Option(name, name, false, name === "prefix")));
  system.addEventListener("change", () => { stop(); choose(); });
  step.addEventListener("input", show);
  document.getElementById("player").hidden = false;
  choose();
}

for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sort(button));
for (const filter of filters) {
  const first = data.first[filter.dataset.filter];
  if (first) filter.value = first;
  filter.addEventListener("change", apply);
}
document.getElementById("filters").hidden = false;
dark.addEventListener("change", draw);
if (Object.keys(data.replays).length) player();
else document.getElementById("blocks").hidden = true;
apply();
