// The data as typed columns, and the rows that are drawn.

const data = JSON.parse(document.getElementById("data").textContent);

const COLORS = {
  "learner step": "#c3cede", wait: "#e8a08f", prepare: "#7fb5a4", proximal: "#8f9fd8",
  train: "#3d6db3", forward: "#6b9bdc", backward: "#2c5490", step: "#1b3257",
  snapshot: "#a874bd", checkpoint: "#70508f", save: "#70508f",
  data: "#7fb5a4", evaluate: "#c9a227", evaluation: "#c9a227",
  "wait for a batch": "#e8a08f", "finish the step": "#7fb5a4", "checkpoint and admit": "#70508f",
  "end of the run": "#c3c9d6",
  decode: "#2f9e73", generate: "#2f9e73", swap: "#d23f55", recompute: "#e57f5b",
  paused: "#b39d8b", load: "#c7a6d4", transfer: "#a874bd",
  environment: "#43a0c9", other: "#878e98", wait_engine: "#e5b344", wait_group: "#d8c6a6",
};
const SPARE = ["#5b8c5a", "#b0763f", "#4a7fa5", "#9c5d7c", "#7d7f35", "#5f6caf"];
const ROLE_NAMES = {slot: "slots", engine: "engines", learner: "learner", publisher: "publisher"};
const WITHOUT_SHARES = ["coordinator"];
const IDLE_NAMES = {slot: "waits for admission", engine: "idle", publisher: "idle"};

const colorOfName = data.names.map((name, i) => COLORS[name] || SPARE[i % SPARE.length]);
const rgbOfName = colorOfName.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));

function isIdle(name) { return name.startsWith("wait") || name.startsWith("idle"); }

// One array of spans per level of nesting: they never overlap, so they can be searched.
function columns(raw) {
  const count = raw.start.length;
  const depth = raw.level.reduce((most, level) => Math.max(most, level + 1), count ? 1 : 0);
  const sizes = new Array(depth).fill(0);
  for (const level of raw.level) sizes[level] += 1;
  const levels = sizes.map((size) => ({
    start: new Float64Array(size), end: new Float64Array(size), name: new Uint16Array(size),
    args: new Uint32Array(size), outer: new Int32Array(size), size: 0,
  }));
  const open = new Array(depth).fill(-1);
  let at = 0;
  for (let i = 0; i < count; i += 1) {
    at += raw.start[i];
    const depthHere = raw.level[i], level = levels[depthHere], k = level.size;
    level.start[k] = at;
    level.end[k] = at + raw.duration[i];
    level.name[k] = raw.name[i];
    level.args[k] = raw.args[i];
    level.outer[k] = depthHere ? open[depthHere - 1] : -1;
    open[depthHere] = raw.name[i];
    level.size += 1;
  }
  return levels;
}

const lanes = data.lanes.map((raw, number) => ({
  number, process: raw.process, role: raw.role, label: raw.label, instants: raw.instants,
  levels: columns(raw), spans: raw.start.length,
}));

// First span of a level that ends after a time.
function firstAfter(level, time) {
  let low = 0, high = level.size;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (level.end[middle] <= time) low = middle + 1; else high = middle;
  }
  return low;
}

// Processes with their lanes; slots of a process are one band and, unfolded, a row each.
const processes = [];
for (const lane of lanes) {
  let process = processes.find((one) => one.name === lane.process);
  if (!process) {
    process = {name: lane.process, lanes: [], slots: [], folded: false, slotsFolded: false};
    processes.push(process);
  }
  (lane.role === "slot" ? process.slots : process.lanes).push(lane);
}
const actors = processes.filter((process) => process.slots.length);
actors.forEach((process, i) => { process.slotsFolded = i > 0 || process.slots.length > 64; });
if (processes.length > 12) processes.forEach((process, i) => { process.folded = i >= 12; });

const HEAD = 22, BAND = 64, THIN = 10, GAP = 3;

function laneHeight(lane) {
  if (lane.role === "slot") return THIN;
  return lane.levels.length > 1 ? 13 * lane.levels.length : 20;
}

// What is drawn from top to bottom, with its place.
function layout() {
  const rows = [];
  let y = 0;
  const add = (row, height) => { rows.push({...row, y, height}); y += height; };
  for (const process of processes) {
    add({kind: "process", process}, HEAD);
    if (process.folded) continue;
    for (const lane of process.lanes) { add({kind: "lane", lane}, laneHeight(lane)); y += GAP; }
    if (process.slots.length) {
      add({kind: "band", process}, BAND);
      y += GAP;
      if (!process.slotsFolded) {
        for (const lane of process.slots) { add({kind: "lane", lane}, THIN); y += 1; }
      }
      y += GAP;
    }
    y += 6;
  }
  return {rows, height: y};
}

function seconds(micros) {
  const s = micros / 1e6;
  if (Math.abs(s) >= 100) return `${s.toFixed(1)} s`;
  if (Math.abs(s) >= 1) return `${s.toFixed(3)} s`;
  if (Math.abs(s) >= 1e-3) return `${(s * 1e3).toFixed(2)} ms`;
  return `${Math.round(micros)} µs`;
}
