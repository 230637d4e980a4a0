// Lines, stacked shares and bars over learner steps or seconds. `shared` is what all charts see.
const shared = { x: "step", series: null, charts: new Set(), hovered: -1 };

const PALETTE = [0, 1, 2, 3, 4, 5, 6, 7].map((i) => `var(--c${i})`);

function column(name) {
  return shared.series.values[name];
}

function horizontal() {
  const found = column(shared.x === "step" ? "step" : "time_s");
  return found ? found.mean : [];
}

function headOf(index) {
  const step = column("step").mean, time = column("time_s");
  const first = index ? step[index - 1] + 1 : 1;
  const steps = shared.series.stride > 1 && first < step[index]
    ? `steps ${first} to ${step[index]}` : `step ${step[index]}`;
  return steps + (time ? `, ${clock(time.mean[index])}` : "");
}

// A chart over steps: draws itself, follows the pointer, draws again when its width changes.
// With `axis` ({xs, labels, head}) it has values of its own to be drawn over.
class Chart {
  constructor(title, unit, height, draw, axis) {
    this.unit = unit;
    this.axis = axis;
    this.height = height;
    this.draw = draw;
    this.picture = svg("svg", { role: "img", "aria-label": title, height });
    this.note = el("span", { class: "unit" });
    this.node = card(title, axisTitle(unit), this.picture);
    this.node.querySelector("header").append(this.note);
    this.picture.addEventListener("pointermove", (event) => this.hover(event));
    this.picture.addEventListener("pointerleave", () => {
      hideTip();
      crossAt(-1);
    });
    shared.charts.add(this);
  }

  xs() {
    return this.axis ? this.axis.xs : horizontal();
  }

  redraw() {
    const width = Math.max(220, this.node.clientWidth - 30 || 360);
    const xs = this.xs();
    this.width = width;
    this.picture.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    if (!xs.length) {
      this.picture.replaceChildren(svg("text", { x: 4, y: 20 }, "no steps yet"));
      return;
    }
    this.low = this.axis ? xs[0] : Math.min(xs[0], shared.x === "step" ? 1 : 0);
    this.high = Math.max(xs[xs.length - 1], this.low + 1e-9);
    this.cross = svg("line", { class: "cross", y1: 6, y2: this.height - 20, visibility: "hidden" });
    const marks = this.draw(this, xs);
    this.picture.replaceChildren(...this.bottom(), ...marks, this.cross);
  }

  x(value) {
    const room = this.width - this.left - this.right;
    return this.left + (room * (value - this.low)) / (this.high - this.low);
  }

  bottom() {
    const y = this.height - 20;
    const nodes = [svg("line", { class: "axis", x1: this.left, x2: this.width - this.right, y1: y, y2: y })];
    const named = this.axis && this.axis.labels;
    for (const tick of named ? this.axis.xs : ticks(this.low, this.high, Math.max(2, this.width / 110))) {
      const plain = this.axis || shared.x === "step";
      const text = named ? named[this.axis.xs.indexOf(tick)] : plain ? number(tick) : clock(tick);
      nodes.push(svg("text", { x: this.x(tick), y: y + 14, "text-anchor": "middle" }, text));
    }
    return nodes;
  }

  vertical(low, high) {
    const top = 8, bottom = this.height - 20;
    this.y = (v) => bottom - ((bottom - top) * (Math.min(Math.max(v, low), high) - low)) / (high - low);
    const nodes = [];
    for (const tick of ticks(low, high, 4)) {
      nodes.push(svg("line", { class: "grid-line", x1: this.left, x2: this.width - this.right,
        y1: this.y(tick), y2: this.y(tick) }));
      nodes.push(svg("text", { x: this.left - 6, y: this.y(tick) + 4, "text-anchor": "end" },
        quantity(tick, this.unit)));
    }
    return nodes;
  }

  hover(event) {
    const xs = this.xs(), box = this.picture.getBoundingClientRect();
    if (!xs.length) return;
    const at = this.low + ((event.clientX - box.left) * this.width / box.width - this.left) *
      (this.high - this.low) / (this.width - this.left - this.right);
    let best = 0;
    for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - at) < Math.abs(xs[best] - at)) best = i;
    crossAt(best, this.axis);
    showTip(event, this.axis ? this.axis.head(best) : headOf(best), this.readout(best));
  }

  crossAt(index) {
    if (!this.cross) return;
    this.cross.setAttribute("visibility", index < 0 ? "hidden" : "visible");
    if (index >= 0) {
      const x = this.x(this.xs()[index]);
      this.cross.setAttribute("x1", x);
      this.cross.setAttribute("x2", x);
    }
  }
}

// Marks a place in all charts over the same axis.
function crossAt(index, axis) {
  if (shared.hovered === index) return;
  shared.hovered = index;
  for (const chart of shared.charts) if (index < 0 || chart.axis === axis) chart.crossAt(index);
}

function axisTitle(unit) {
  return { fraction: "", "": "", "1/s": "", s: "", bytes: "" }[unit] ?? unit;
}

// Lines of means, with a band from the least to the largest value where points stand for many steps.
// The lines of a chart with an axis of its own bring their values.
function lineChart(spec) {
  const values = (line) => line.data || column(line.name);
  const colorOf = (line, i) => line.color || PALETTE[i % PALETTE.length];
  const chart = new Chart(spec.title, spec.unit, 176, (self, xs) => {
    const lines = spec.lines.filter(values);
    const alone = lines.length === 1;
    self.left = 50;
    self.right = spec.legend === false ? 14 : alone ? 48 : Math.min(150, 26 + 6 * Math.max(...lines.map((l) => l.label.length)));
    const [low, high, peak] = extent(lines.map(values), spec.from_zero, spec.unit);
    self.note.textContent = peak === null ? "" : `peaks up to ${quantity(peak, spec.unit)} are cut off`;
    const nodes = self.vertical(low, high);
    const ends = [];
    lines.forEach((line, i) => {
      const data = values(line), color = colorOf(line, i);
      if (data.low) nodes.push(svg("path", { d: band(self, xs, data), fill: color, opacity: 0.16 }));
      nodes.push(...strokes(self, xs, data.mean, color, line.dash));
      const last = data.mean.findLastIndex((v) => v !== null);
      if (last >= 0) {
        ends.push({ color, x: self.x(xs[last]), y: self.y(data.mean[last]),
          text: alone ? quantity(data.mean[last], spec.unit) : line.label });
      }
    });
    return spec.legend === false ? nodes : [...nodes, ...endLabels(self, ends)];
  }, spec.axis);
  chart.readout = (i) => spec.lines.filter(values).map((line, k) => {
    const data = values(line);
    const range = data.low && data.low[i] !== data.high[i] && data.low[i] !== null
      ? ` (${quantity(data.low[i], spec.unit)} to ${quantity(data.high[i], spec.unit)})` : "";
    return [colorOf(line, k), line.label, quantity(data.mean[i], spec.unit) + range];
  });
  const meanings = spec.lines.map((line) => [line.label, line.meaning]).filter((m) => m[1]);
  chart.node.title = "";
  chart.node.querySelector("h3").title = meanings.map((m) => m.join(": ")).join("\n");
  return chart;
}

// Least and largest value to show; from 0 where that is right or near; and what is beyond, if cut.
function extent(lines, fromZero, unit) {
  const all = [], means = [];
  for (const data of lines) {
    for (const part of [data.mean, data.low, data.high]) {
      for (const v of part || []) if (v !== null) all.push(v);
    }
    for (const v of data.mean) if (v !== null) means.push(v);
  }
  if (!all.length) return [0, 1, null];
  let low = Infinity, high = -Infinity, peak = null;
  for (const v of all) { low = Math.min(low, v); high = Math.max(high, v); }
  means.sort((a, b) => a - b);
  const usual = means[Math.floor(0.98 * (means.length - 1))];
  if (unit !== "fraction" && means.length > 20 && usual > 0 && high > 6 * usual) {
    peak = high;
    high = 2 * usual;
  }
  if (low >= 0 && (fromZero || low < 0.6 * high)) low = 0;
  if (high === low) { high += Math.abs(high) * 0.1 || 1; if (low !== 0) low -= Math.abs(low) * 0.1; }
  const room = 0.04 * (high - low);
  return [low === 0 ? 0 : low - room, high + room, peak];
}

function strokes(chart, xs, values, color, dash) {
  const known = [];
  values.forEach((v, i) => { if (v !== null) known.push([chart.x(xs[i]), chart.y(v)]); });
  const nodes = [svg("path", { fill: "none", stroke: color, "stroke-width": 1.6, "stroke-linejoin": "round",
    "stroke-dasharray": dash, d: known.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("") })];
  if (known.length <= 40 && (known.length < values.length || chart.axis)) {
    nodes.push(...known.map(([cx, cy]) => svg("circle", { cx, cy, r: 2.5, fill: color })));
  }
  return nodes;
}

function band(chart, xs, data) {
  const up = [], down = [];
  xs.forEach((x, i) => {
    if (data.low[i] === null) return;
    up.push(`${chart.x(x).toFixed(1)} ${chart.y(data.high[i]).toFixed(1)}`);
    down.unshift(`${chart.x(x).toFixed(1)} ${chart.y(data.low[i]).toFixed(1)}`);
  });
  return up.length ? `M${[...up, ...down].join("L")}Z` : "";
}

// Labels at the ends of lines, moved apart so that none covers another.
function endLabels(chart, ends) {
  ends.sort((a, b) => a.y - b.y);
  const bottom = chart.height - 22;
  ends.forEach((end, i) => { end.at = Math.max(end.y, i ? ends[i - 1].at + 13 : 10); });
  for (let i = ends.length - 1, floor = bottom; i >= 0; i--) {
    ends[i].at = Math.min(ends[i].at, floor);
    floor = ends[i].at - 13;
  }
  return ends.flatMap((end) => [
    end.x === null ? "" : svg("circle", { cx: end.x, cy: end.y, r: 2.8, fill: end.color }),
    svg("circle", { cx: chart.width - chart.right + 11, cy: end.at, r: 3, fill: end.color }),
    svg("text", { x: chart.width - chart.right + 18, y: end.at + 4 }, end.text),
  ]);
}

// Shares that add up to 1; `layers` is a function of [{label, color, values}]. Where none is known, the
// last known ones go on.
function shareChart(title, layers) {
  const chart = new Chart(title, "fraction", 170, (self, xs) => {
    self.left = 46;
    self.right = 104;
    const nodes = self.vertical(0, 1), ends = [];
    let below = xs.map(() => 0);
    for (const layer of carriedOn(layers())) {
      const above = below.map((v, i) => v + (layer.values[i] || 0));
      const top = xs.map((x, i) => `${self.x(x).toFixed(1)} ${self.y(above[i]).toFixed(1)}`);
      const bottom = xs.map((x, i) => `${self.x(x).toFixed(1)} ${self.y(below[i]).toFixed(1)}`);
      if (xs.length === 1) {
        const x = self.width - self.right;
        top.unshift(`${self.left} ${self.y(above[0])}`);
        bottom.unshift(`${self.left} ${self.y(below[0])}`);
        top[1] = `${x} ${self.y(above[0])}`;
        bottom[1] = `${x} ${self.y(below[0])}`;
      }
      nodes.push(svg("path", { d: `M${[...top, ...bottom.reverse()].join("L")}Z`, fill: layer.color }));
      const near = above.slice(-Math.ceil(above.length / 8)), from = below.slice(-near.length);
      const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
      if (mean(near) - mean(from) > 0.03) {
        const y = self.y((mean(near) + mean(from)) / 2);
        ends.push({ color: layer.color, x: null, y, text: layer.label });
      }
      below = above;
    }
    return [...nodes, ...endLabels(self, ends)];
  });
  chart.readout = (i) => carriedOn(layers()).filter((layer) => layer.values[i] > 0).reverse()
    .map((layer) => [layer.color, layer.label, quantity(layer.values[i], "fraction")]);
  return chart;
}

function carriedOn(layers) {
  const length = layers.length ? layers[0].values.length : 0, from = [];
  for (let i = 0; i < length; i++) {
    from.push(i && !layers.some((layer) => layer.values[i]) ? from[i - 1] : i);
  }
  return layers.map((layer) => ({ ...layer, values: from.map((i) => layer.values[i]) }));
}

// One bar for each label; heights from 0, with their share in words.
function barChart(title, unit, labels, values) {
  const width = 420, height = 176, left = 46, total = values.reduce((a, b) => a + b, 0) || 1;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  const high = Math.max(...values, 1) / total, step = (width - left) / Math.max(labels.length, 4);
  const y = (v) => height - 20 - ((height - 42) * v) / high;
  for (const tick of ticks(0, high, 4)) {
    picture.append(svg("line", { class: "grid-line", x1: left, x2: width, y1: y(tick), y2: y(tick) }),
      svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, quantity(tick, "fraction")));
  }
  labels.forEach((label, i) => {
    const share = values[i] / total, x = left + i * step, middle = x + step / 2;
    const bar = svg("rect", { x: x + step * 0.1, width: step * 0.8, y: y(share), rx: 2,
      height: Math.max(height - 20 - y(share), values[i] ? 1 : 0), fill: "var(--c0)" });
    const area = svg("rect", { x, width: step, y: 0, height, fill: "transparent" });
    area.addEventListener("pointermove", (event) => showTip(event, `${label} ${unit}`, [
      [null, "tokens", number(values[i])], [null, "share", quantity(share, "fraction")]]));
    area.addEventListener("pointerleave", hideTip);
    picture.append(bar,
      svg("text", { x: middle, y: y(share) - 5, "text-anchor": "middle", class: "halo" },
        values[i] ? quantity(Number(share.toPrecision(2)), "fraction") : ""),
      svg("text", { x: middle, y: height - 5, "text-anchor": "middle" }, label), area);
  });
  return card(title, unit, picture);
}
