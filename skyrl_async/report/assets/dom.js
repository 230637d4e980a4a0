// Elements, numbers and the readout that follows the pointer. Text only ever becomes a text node.
const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined) continue;
    if (name === "style") Object.assign(node.style, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3) return value.toExponential(1).replace("e-", "e−");
  for (const [limit, suffix] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) return trimmed(value / (suffix === "k" ? 1e3 : limit)) + suffix;
  }
  return trimmed(value);
}

function trimmed(value) {
  return String(Number(value.toPrecision(3)));
}

function quantity(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "fraction") return trimmed(100 * value) + " %";
  if (unit === "bytes") return number(value).replace(/([kMG]?)$/, " $1B");
  if (unit === "s" && Math.abs(value) < 1 && value !== 0) return trimmed(1000 * value) + " ms";
  return number(value) + (unit === "s" ? " s" : "");
}

function clock(seconds) {
  if (seconds < 60) return trimmed(seconds) + " s";
  const whole = Math.round(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return (parts[0] ? parts[0] + ":" + String(parts[1]).padStart(2, "0") : parts[1]) +
    ":" + String(parts[2]).padStart(2, "0");
}

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

const tip = el("div", { id: "tip", role: "status" });

function showTip(event, head, rows) {
  const body = el("table", null, ...rows.map(([color, label, value]) =>
    el("tr", null,
      el("td", null, color ? el("span", { class: "swatch", style: { background: color } }) : "",
        label),
      el("td", { class: "num" }, value))));
  tip.replaceChildren(el("div", { class: "head" }, head), body);
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > window.innerWidth
    ? event.clientX - 14 - box.width : event.clientX + 14;
  const top = Math.min(event.clientY + 14, window.innerHeight - box.height - 6);
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, top) + "px";
}

function hideTip() {
  tip.style.display = "none";
}

function card(title, unit, ...children) {
  return el("section", { class: "card" },
    el("header", null, el("h3", null, title), unit ? el("span", { class: "unit" }, unit) : null),
    ...children);
}

function table(headers, rows) {
  return el("div", { class: "scroll" }, el("table", { class: "rows" },
    el("thead", null, el("tr", null, ...headers.map((h) => el("th", null, h)))),
    el("tbody", null, ...rows)));
}

function row(...cells) {
  return el("tr", null, ...cells.map((cell) => el("td", null, cell)));
}
