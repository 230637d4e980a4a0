// The window in time, and everything that is drawn over the pixels.

const plot = document.getElementById("plot"), tip = document.getElementById("tip");
const canvas = document.getElementById("canvas"), overlay = document.getElementById("overlay");
const context = canvas.getContext("2d", {alpha: false}), over = overlay.getContext("2d");
const NAMES = 190, AXIS = 24, SHORTEST = 20, MAX_ARROWS = 120;
const window_ = {start: 0, end: Math.max(1, data.end)};
const view = {scroll: 0, hover: null, version: null, pending: false, places: layout()};

function width() { return Math.max(50, plot.clientWidth - NAMES); }
function timeAt(x) { return window_.start + (x - NAMES) / width() * (window_.end - window_.start); }
function xAt(time) { return NAMES + (time - window_.start) / (window_.end - window_.start) * width(); }

function show(start, end) {
  const length = Math.min(Math.max(end - start, SHORTEST), data.end * 1.04 + 1);
  const most = data.end * 1.02 + 1 - length;
  window_.start = Math.min(Math.max(start, -data.end * 0.02), Math.max(most, -data.end * 0.02));
  window_.end = window_.start + length;
  request();
}

function scrollTo(y) {
  const most = Math.max(0, view.places.height + AXIS - plot.clientHeight);
  view.scroll = Math.min(Math.max(0, y), most);
  request();
}

function request() {
  if (view.pending) return;
  view.pending = true;
  requestAnimationFrame(() => { view.pending = false; draw(); });
}

function draw() {
  const began = performance.now();
  const ratio = devicePixelRatio || 1;
  for (const one of [canvas, overlay]) {
    const w = Math.round(plot.clientWidth * ratio), h = Math.round(plot.clientHeight * ratio);
    if (one.width !== w || one.height !== h) { one.width = w; one.height = h; }
  }
  const ground = themeColor("--ground"), row = rgb(themeColor("--row"));
  context.setTransform(1, 0, 0, 1, 0, 0);
  view.own = lanes.map((lane) => ownTime(lane, window_));
  const drawn = drawPixels(ratio, row, rgb(ground));
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  drawText();
  drawNames(ground);
  drawAxis(ground);
  drawOverlay();
  drawShares();
  const told = document.body.dataset;
  told.lanes = String(drawn);
  told.spans = String(lanes.reduce((sum, lane) => sum + lane.spans, 0));
  told.window = `${Math.round(window_.start)}-${Math.round(window_.end)}`;
  told.pixels = String(view.coloredPixels);
  told.drawMs = (performance.now() - began).toFixed(1);
}

function visibleRows() {
  const top = view.scroll - AXIS, bottom = view.scroll + plot.clientHeight;
  return view.places.rows.filter((r) => r.y + r.height > top && r.y < bottom);
}

function drawPixels(ratio, row, ground) {
  const left = Math.round(NAMES * ratio), wide = canvas.width - left;
  if (!view.image || view.image.width !== canvas.width || view.image.height !== canvas.height) {
    view.image = context.createImageData(canvas.width, canvas.height);
    view.words = new Uint32Array(view.image.data.buffer);
  }
  view.words.fill(0xff000000 | (ground[2] << 16) | (ground[1] << 8) | ground[0]);
  const scaled = {words: view.words, width: canvas.width, height: canvas.height};
  let drawn = 0;
  view.coloredPixels = 0;
  for (const r of visibleRows()) {
    const top = Math.round((AXIS + r.y - view.scroll) * ratio);
    if (r.kind === "band") {
      paintBand(r.process.slots, window_, wide, scaled, left, top, Math.round(r.height * ratio), row);
      drawn += 1;
    } else if (r.kind === "lane") {
      const levels = r.lane.levels, high = r.height / Math.max(1, levels.length);
      levels.forEach((level, i) => {
        const from = Math.round((AXIS + r.y + i * high - view.scroll) * ratio);
        const to = Math.round((AXIS + r.y + (i + 1) * high - view.scroll) * ratio);
        const pixels = paintLevel(level, window_, wide, i ? ground : row);
        view.coloredPixels += scratch.colored * (to - from);
        paintEdges(level, window_, pixels, wide);
        fillRow(scaled, pixels, left, from, to - from);
      });
      drawn += 1;
    }
  }
  context.putImageData(view.image, 0, 0);
  return drawn;
}

// Names inside of spans that are wide enough.
function drawText() {
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  const scale = width() / (window_.end - window_.start);
  for (const r of visibleRows()) {
    if (r.kind !== "lane" || r.height < 13) continue;
    const high = r.height / Math.max(1, r.lane.levels.length);
    r.lane.levels.forEach((level, l) => {
      for (let i = firstAfter(level, window_.start); i < level.size; i += 1) {
        if (level.start[i] >= window_.end) break;
        if ((level.end[i] - level.start[i]) * scale < 34) continue;
        const from = Math.max(NAMES, xAt(level.start[i]));
        const wide = Math.min(plot.clientWidth, xAt(level.end[i])) - from;
        if (wide < 34) continue;
        const color = rgbOfName[level.name[i]];
        const bright = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] > 140;
        const version = data.args[level.args[i]].policy_version;
        let text = data.names[level.name[i]] + (version === undefined ? "" : ` ${version}`);
        text = fitted(text, wide - 8);
        if (text.length < 4) continue;
        context.fillStyle = bright ? "#15181c" : "#ffffff";
        context.fillText(text, from + 4, AXIS + r.y - view.scroll + (l + 0.5) * high + 0.5);
      }
    });
  }
}

function drawNames(ground) {
  context.fillStyle = ground;
  context.fillRect(0, 0, NAMES - 1, plot.clientHeight);
  const ink = themeColor("--ink"), soft = themeColor("--soft"), line = themeColor("--line");
  context.textBaseline = "middle";
  for (const r of visibleRows()) {
    const y = AXIS + r.y - view.scroll, middle = y + r.height / 2;
    if (r.kind === "process") {
      context.fillStyle = line;
      context.fillRect(0, y, plot.clientWidth, 1);
      context.font = "600 12px system-ui, sans-serif";
      context.fillStyle = ink;
      context.fillText(`${r.process.folded ? "▸" : "▾"} ${r.process.name}`, 12, middle + 2);
      continue;
    }
    context.font = r.height < 12 ? "9px system-ui, sans-serif" : "12px system-ui, sans-serif";
    context.fillStyle = soft;
    if (r.kind === "band") {
      const mark = r.process.slotsFolded ? "▸" : "▾";
      context.fillText(`${mark} ${r.process.slots.length} slots, stacked`, 22, middle);
      continue;
    }
    const idle = idleTime(view.own[r.lane.number]) / (window_.end - window_.start);
    context.fillText(fitted(r.lane.label, NAMES - 90), 34, middle);
    context.textAlign = "right";
    context.fillText(`${Math.round(100 * (1 - idle))} %`, NAMES - 12, middle);
    context.textAlign = "left";
  }
  context.fillStyle = line;
  context.fillRect(NAMES - 1, 0, 1, plot.clientHeight);
}

function idleTime(own) {
  let sum = 0;
  own.forEach((time, name) => {
    if (name === data.names.length || isIdle(data.names[name])) sum += time;
  });
  return sum;
}

function fitted(text, wide) {
  let short = text;
  while (short.length > 4 && context.measureText(short).width > wide) short = `${short.slice(0, -2)}…`;
  return short;
}

function drawAxis(ground) {
  context.fillStyle = ground;
  context.fillRect(0, 0, plot.clientWidth, AXIS - 1);
  context.fillStyle = themeColor("--line");
  context.fillRect(0, AXIS - 1, plot.clientWidth, 1);
  const span = window_.end - window_.start, wanted = Math.max(2, width() / 110);
  const power = 10 ** Math.floor(Math.log10(span / wanted));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => span / s <= wanted);
  context.font = "11px system-ui, sans-serif";
  const digits = Math.max(0, 6 - Math.floor(Math.log10(step) + 1e-9));
  for (let t = Math.ceil(window_.start / step) * step; t < window_.end; t += step) {
    const x = xAt(t);
    context.fillStyle = themeColor("--line");
    context.fillRect(Math.round(x), AXIS - 6, 1, 6);
    context.fillStyle = themeColor("--soft");
    context.textAlign = "center";
    if (x > NAMES + 12 && x < plot.clientWidth - 22) {
      context.fillText(`${(t / 1e6).toFixed(digits)} s`, x, 10);
    }
  }
  context.textAlign = "left";
  context.fillStyle = themeColor("--soft");
  context.fillText("busy", NAMES - 36, 10);
}

// Where a lane is drawn, folded into its band or its process if need be.
function placeOf(number) {
  const lane = lanes[number];
  let fallback = null;
  for (const r of view.places.rows) {
    if (r.kind === "lane" && r.lane === lane) {
      return AXIS + r.y - view.scroll + Math.min(r.height, r.height / r.lane.levels.length) / 2;
    }
    if (r.kind === "process" && r.process.name === lane.process) fallback = r;
  }
  return fallback ? AXIS + fallback.y - view.scroll + HEAD / 2 : 0;
}

function drawOverlay() {
  over.setTransform(1, 0, 0, 1, 0, 0);
  over.clearRect(0, 0, overlay.width, overlay.height);
  const ratio = devicePixelRatio || 1;
  over.setTransform(ratio, 0, 0, ratio, 0, 0);
  over.save();
  over.beginPath();
  over.rect(NAMES, AXIS, width(), plot.clientHeight);
  over.clip();
  const visible = data.flows.filter((flow) =>
    flow.stops[flow.stops.length - 1][1] >= window_.start && flow.stops[0][1] <= window_.end);
  const every = Math.ceil(visible.length / MAX_ARROWS);
  visible.forEach((flow, i) => {
    const chosen = flow.version === view.version;
    if (chosen || i % every === 0) drawArrow(flow, chosen);
  });
  if (view.hover) outline(view.hover);
  over.restore();
  scrollMark();
}

function drawArrow(flow, chosen) {
  const points = flow.stops.map(([lane, time]) => [xAt(time), placeOf(lane)]);
  over.strokeStyle = over.fillStyle = chosen ? "#d23f55" : dark.matches ? "#d9c7e6" : "#6b4687";
  over.globalAlpha = chosen ? 1 : view.version === null ? 0.55 : 0.15;
  over.lineWidth = chosen ? 2 : 1;
  over.beginPath();
  over.moveTo(...points[0]);
  for (let i = 1; i < points.length; i += 1) {
    const [x0, y0] = points[i - 1], [x1, y1] = points[i], bend = Math.min(40, Math.abs(x1 - x0) / 2 + 6);
    over.bezierCurveTo(x0 + bend, y0, x1 - bend, y1, x1, y1);
  }
  over.stroke();
  const [x, y] = points[points.length - 1];
  over.beginPath();
  over.moveTo(x, y);
  over.lineTo(x - 7, y - 3.5);
  over.lineTo(x - 7, y + 3.5);
  over.fill();
  over.globalAlpha = 1;
}

function outline(hit) {
  const x = Math.max(NAMES, xAt(hit.start)), right = Math.min(plot.clientWidth, xAt(hit.end));
  over.strokeStyle = themeColor("--ink");
  over.lineWidth = 1.5;
  over.strokeRect(x, hit.y, Math.max(2, right - x), hit.height);
}

function scrollMark() {
  const total = view.places.height + AXIS, high = plot.clientHeight;
  if (total <= high) return;
  over.fillStyle = themeColor("--soft");
  over.globalAlpha = 0.5;
  over.fillRect(plot.clientWidth - 6, view.scroll / total * high, 4, high * high / total);
  over.globalAlpha = 1;
}

// Shares of each role in the visible time.
function drawShares() {
  const length = window_.end - window_.start, roles = new Map();
  for (const lane of lanes) {
    if (WITHOUT_SHARES.includes(lane.role)) continue;
    const sums = roles.get(lane.role) || {total: 0, own: new Float64Array(data.names.length + 1)};
    view.own[lane.number].forEach((time, name) => { sums.own[name] += time; });
    sums.total += length;
    roles.set(lane.role, sums);
  }
  const shares = document.getElementById("shares");
  shares.replaceChildren(...[...roles].map(([role, sums]) => roleRow(role, sums)));
}

function element(tag, text, style) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  if (style) Object.assign(made.style, style);
  return made;
}

function roleRow(role, {total, own}) {
  const row = element("div"), bar = element("div"), parts = element("div");
  row.className = "role"; bar.className = "bar"; parts.className = "parts";
  const none = data.names.length;
  const sorted = [...own.entries()].filter(([, time]) => time / total >= 0.0005)
    .sort((a, b) => (a[0] === none) - (b[0] === none) || b[1] - a[1]);
  for (const [name, time] of sorted) {
    const share = time / total, color = name === none ? "transparent" : colorOfName[name];
    const text = name === none ? IDLE_NAMES[role] || "idle" : data.names[name].replaceAll("_", " ");
    bar.append(element("i", "", {width: `${100 * share}%`, background: color}));
    const part = element("span"), mark = element("i", "", {background: color});
    if (name === none) mark.style.boxShadow = `inset 0 0 0 1px ${themeColor("--soft")}`;
    part.append(mark, `${text} `, element("em", `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`));
    parts.append(part);
  }
  row.append(element("b", ROLE_NAMES[role] || role), bar, parts);
  return row;
}
