// The page of a sweep: rewards against the axis that was swept, and over steps at each of its places.
function drawSweep(page, content) {
  document.title = `${content.name}: sweep`;
  const axis = { xs: content.labels.map((_, i) => i), labels: content.labels,
    head: (i) => `${content.axis || "runs"} ${content.labels[i]}` };
  const order = content.against_axis[0].lines.map((line) => line.label);
  const legend = order.length <= 6 && order.every((label) => label.length <= 18);
  const styled = (lines) => lines.map((line) => {
    const i = order.indexOf(line.label);
    return { ...line, color: PALETTE[i % PALETTE.length], dash: i < PALETTE.length ? null : "5 3" };
  });
  const summary = content.against_axis.map((chart) => lineChart({ ...chart, axis, legend,
    title: content.axis ? `${chart.title} against ${content.axis}` : chart.title,
    from_zero: true, lines: styled(chart.lines) }));
  const steps = content.over_steps.filter((chart) => chart.lines.length).map((chart) => lineChart({
    title: content.axis ? `${content.axis} ${chart.label}` : "reward", unit: "", from_zero: true, legend,
    axis: { xs: chart.steps, labels: null, head: (i) => `step ${chart.steps[i]}` },
    lines: styled(chart.lines) }));
  page.replaceChildren(
    el("div", null, el("h1", null, content.name), el("span", { class: "status good" }, "sweep")),
    el("p", { class: "muted" }, el("code", null, content.folder), ` · commit ${content.commits.join(", ")}`),
    el("div", { class: "tiles" }, ...content.tiles.map((tile) =>
      el("div", { class: tile.good ? "tile" : "tile bad" }, el("div", { class: "label" }, tile.label),
        el("div", { class: "value" }, tile.value), el("div", { class: "note" }, tile.note)))),
    el("h2", null, "Summary"), el("p", { class: "hint" }, content.band),
    legend ? "" : sweepLegend(styled(content.against_axis[0].lines)),
    el("div", { class: "grid" }, ...summary.map((chart) => chart.node)),
    el("h2", null, "Final reward"), cellTable(content),
    el("h2", null, "Reward over steps, mean over seeds"),
    el("div", { class: "grid" }, ...steps.map((chart) => chart.node)),
    failedTable(content.failed),
    el("p", { class: "muted" }, "The last run again: ", el("code", null, content.command)));
  for (const chart of [...summary, ...steps]) chart.redraw();
}

function sweepLegend(lines) {
  return el("div", { class: "legend" }, ...lines.map((line) => el("span", null,
    svg("svg", { class: "key", viewBox: "0 0 18 8" }, svg("path", { d: "M0 4L18 4", stroke: line.color,
      "stroke-width": 2.4, "stroke-dasharray": line.dash })), line.label)));
}

function cellTable(content) {
  const lines = [...new Set(content.cells.map((cell) => cell.line))];
  const rows = lines.map((line) => row(el("code", null, line), ...content.labels.map((label) => {
    const cell = content.cells.find((c) => c.line === line && c.x === label);
    if (!cell || cell.mean === null) return cell && cell.failed ? "failed" : "";
    const half = cell.high === null ? 0 : (cell.high - cell.low) / 2;
    const marks = [cell.collapsed ? `${cell.collapsed} collapsed` : "", cell.failed ? `${cell.failed} failed` : ""];
    const words = marks.filter(Boolean).join(", ");
    return el("span", null, number(cell.mean), cell.seeds > 1 ? ` ± ${number(half)}` : "",
      el("span", { class: "muted" }, ` (${cell.seeds})`), words ? el("div", { class: "error" }, words) : "");
  })));
  const heads = [content.lines_are || "", ...content.labels.map((l) => (content.axis ? `${content.axis} ${l}` : "reward"))];
  return el("section", { class: "card wide" }, table(heads, rows),
    el("p", { class: "muted" }, "Mean, half the width of the band, and the number of seeds."));
}

function failedTable(failed) {
  if (!failed.length) return "";
  return el("div", null, el("h2", null, "Failed runs"), el("section", { class: "card wide" },
    table(["run", "attempts", "error"], failed.map((f) => row(el("code", null, f.cell), String(f.attempts), f.error)))));
}
