// Draws what the page holds, and on a live page what the run has added since.
const page = document.getElementById("page");
const live = document.documentElement.dataset.live === "true";
let content = JSON.parse(document.getElementById("content").textContent);

function draw() {
  if (content.kind === "sweep") {
    drawSweep(page, content);
  } else {
    shared.series = content.series;
    drawRun(page, content);
  }
}

// Puts newer content in place of the old one; lines go on where the page's end.
function merge(old, news) {
  const full = news.series.first === 0;
  if (!full) {
    for (const [name, data] of Object.entries(news.series.values)) {
      const before = old.series.values[name] || { mean: [] };
      for (const part of ["mean", "low", "high"]) {
        if (!data[part] && !before[part]) continue;
        const head = (before[part] || before.mean).slice(0, news.series.first);
        while (head.length < news.series.first) head.push(null);
        data[part] = [...head, ...(data[part] || data.mean)];
      }
    }
  }
  return { ...old, ...news };
}

const PAUSE_MS = 2000, PAUSE_AT_END_MS = 15000;

async function poll() {
  if (!document.hidden) {
    const { stride, rows } = content.series;
    const known = `stride=${stride}&buckets=${Math.floor(rows / stride)}&parts=${content.parts}`;
    const stale = document.getElementById("stale");
    try {
      const answer = await fetch(`data?${known}`, { cache: "no-store" });
      if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
      content = merge(content, await answer.json());
      draw();
      document.documentElement.dataset.polled = String(content.series.rows);
      stale.style.display = "none";
    } catch (error) {
      stale.textContent = ` no news from the run (${error.message})`;
      stale.style.display = "inline";
    }
  }
  setTimeout(poll, content.status === "unfinished" ? PAUSE_MS : PAUSE_AT_END_MS);
}

document.body.append(tip);
draw();
new ResizeObserver(() => redrawAll()).observe(page);
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((box) => { box.open = true; });
  redrawAll();
});
requestAnimationFrame(() => requestAnimationFrame(() => {
  document.documentElement.dataset.drawn = String(Math.round(performance.now()));
}));
if (live) setTimeout(poll, 100);
