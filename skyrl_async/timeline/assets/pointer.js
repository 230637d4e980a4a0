// What the pointer and the keys do.

function rowAt(y) {
  const at = y - AXIS + view.scroll;
  return view.places.rows.find((r) => at >= r.y && at < r.y + r.height);
}

// The span under a point, also one of less than a pixel.
function spanAt(x, y) {
  const r = y > AXIS ? rowAt(y) : null;
  if (!r || r.kind !== "lane" || x < NAMES) return null;
  const high = r.height / Math.max(1, r.lane.levels.length);
  const top = AXIS + r.y - view.scroll, number = Math.floor((y - top) / high);
  const level = r.lane.levels[Math.min(number, r.lane.levels.length - 1)];
  if (!level) return null;
  const slack = 2 * (window_.end - window_.start) / width(), time = timeAt(x);
  let best = -1, least = slack;
  for (let i = firstAfter(level, time - slack); i < level.size && level.start[i] <= time + slack; i += 1) {
    const away = Math.max(level.start[i] - time, time - level.end[i], 0);
    if (best < 0 || away < least) { best = i; least = away; }
    if (away === 0) break;
  }
  if (best < 0) return null;
  return {
    lane: r.lane, name: data.names[level.name[best]], start: level.start[best],
    end: level.end[best], args: data.args[level.args[best]], y: top + number * high, height: high,
  };
}

function hover(event) {
  const box = plot.getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top;
  view.hover = spanAt(x, y);
  view.version = view.hover && view.hover.args.policy_version !== undefined
    ? view.hover.args.policy_version : null;
  drawOverlay();
  const lines = view.hover ? spanLines(view.hover) : x < NAMES ? nameLines(rowAt(y)) : null;
  tip.hidden = !lines;
  if (!lines) return;
  tip.replaceChildren(element("b", lines[0]), `\n${lines.slice(1).join("\n")}`);
  tip.style.left = `${Math.min(x + 14, plot.clientWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(y + 16, plot.clientHeight - tip.offsetHeight - 8)}px`;
}

function spanLines(hit) {
  const more = Object.entries(hit.args).map(([key, value]) => `${key.replaceAll("_", " ")} ${value}`);
  return [`${hit.name.replaceAll("_", " ")}  ${seconds(hit.end - hit.start)}`, ...more,
    `${hit.lane.process}, ${hit.lane.label}`, `from ${(hit.start / 1e6).toFixed(6)} s`];
}

function nameLines(r) {
  if (!r || r.kind !== "lane") return null;
  const length = window_.end - window_.start;
  const own = [...ownTime(r.lane, window_).entries()];
  const parts = own.filter(([, t]) => t > 0).sort((a, b) => b[1] - a[1]);
  return [`${r.lane.process}, ${r.lane.label}`, ...parts.map(([name, time]) =>
    `${(100 * time / length).toFixed(1)} %  ${(data.names[name] || "idle").replaceAll("_", " ")}`)];
}

function zoom(factor, x) {
  const at = timeAt(Math.max(NAMES, x));
  show(at - (at - window_.start) * factor, at + (window_.end - at) * factor);
}

overlay.addEventListener("wheel", (event) => {
  event.preventDefault();
  const x = event.clientX - plot.getBoundingClientRect().left;
  if (x < NAMES || event.altKey) scrollTo(view.scroll + event.deltaY);
  else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
    const move = (event.deltaX || event.deltaY) / width() * (window_.end - window_.start);
    show(window_.start + move, window_.end + move);
  } else zoom(1.0015 ** event.deltaY, x);
}, {passive: false});

let drag = null;
overlay.addEventListener("pointerdown", (event) => {
  drag = {x: event.clientX, y: event.clientY, start: window_.start, end: window_.end,
    scroll: view.scroll, moved: false};
  overlay.setPointerCapture(event.pointerId);
});
overlay.addEventListener("pointermove", (event) => {
  if (!drag) { hover(event); return; }
  const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
  if (!drag.moved && Math.abs(dx) + Math.abs(dy) < 4) return;
  drag.moved = true;
  overlay.classList.add("moving");
  tip.hidden = true;
  const move = -dx / width() * (drag.end - drag.start);
  show(drag.start + move, drag.end + move);
  scrollTo(drag.scroll - dy);
});
overlay.addEventListener("pointerup", (event) => {
  if (drag && !drag.moved) fold(event);
  drag = null;
  overlay.classList.remove("moving");
});
overlay.addEventListener("pointercancel", () => { drag = null; });
overlay.addEventListener("pointerleave", () => {
  view.hover = null;
  view.version = null;
  tip.hidden = true;
  drawOverlay();
});
overlay.addEventListener("dblclick", (event) => {
  const box = plot.getBoundingClientRect();
  const hit = spanAt(event.clientX - box.left, event.clientY - box.top);
  if (!hit) return;
  const margin = (hit.end - hit.start) * 0.15 + 1;
  show(hit.start - margin, hit.end + margin);
});

function fold(event) {
  const box = plot.getBoundingClientRect();
  const r = event.clientX - box.left < NAMES ? rowAt(event.clientY - box.top) : null;
  if (!r || r.kind === "lane") return;
  if (r.kind === "process") r.process.folded = !r.process.folded;
  else r.process.slotsFolded = !r.process.slotsFolded;
  view.places = layout();
  scrollTo(view.scroll);
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const middle = NAMES + width() / 2, step = (window_.end - window_.start) * 0.2;
  const acts = {
    w: () => zoom(0.7, middle), s: () => zoom(1 / 0.7, middle),
    a: () => show(window_.start - step, window_.end - step),
    d: () => show(window_.start + step, window_.end + step),
    0: () => show(0, data.end), Home: () => show(0, data.end),
  };
  acts.ArrowLeft = acts.a; acts.ArrowRight = acts.d; acts["+"] = acts.w; acts["-"] = acts.s;
  acts.ArrowUp = () => scrollTo(view.scroll - 60); acts.ArrowDown = () => scrollTo(view.scroll + 60);
  const act = acts[event.key] || acts[event.key.toLowerCase()];
  if (act) { act(); event.preventDefault(); }
});
new ResizeObserver(() => scrollTo(view.scroll)).observe(plot);
dark.addEventListener("change", request);
if (data.left_out) {
  const help = document.getElementById("help");
  help.textContent += ` ${data.left_out} more slots are in timeline.json.`;
}
// #start-end in seconds opens that part.
const part = /^#([\d.]+)-([\d.]+)$/.exec(location.hash);
if (part && Number(part[2]) > Number(part[1])) show(Number(part[1]) * 1e6, Number(part[2]) * 1e6);
else show(0, data.end);
draw();
