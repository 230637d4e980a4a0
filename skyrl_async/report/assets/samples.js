// Trajectories with every token colored by its age, its advantage or its probability.
const SEEN = "prompt or observation", OUT = "sampled, not in the loss";
const view = { color: "age", version: null };

const COLORS = {
  age: { button: "version", legend: ageLegend, paint: paintAge },
  advantage: { button: "advantage", legend: advantageLegend, paint: paintAdvantage },
  logprob: { button: "probability", legend: logprobLegend, paint: paintLogprob },
};

function samplesPanel(samples) {
  const box = el("div");
  const versions = [...new Set(samples.map((s) => s.train_version))];
  const draw = () => {
    if (!versions.includes(view.version)) view.version = versions[versions.length - 1];
    const shown = samples.filter((s) => s.train_version === view.version);
    const scale = scaleOf(samples);
    const choose = (label, pressed, onclick) =>
      el("button", { "aria-pressed": String(pressed), onclick }, label);
    box.replaceChildren(
      el("div", { class: "bar" }, el("span", { class: "muted" }, "color tokens by"),
        ...Object.entries(COLORS).map(([name, { button }]) =>
          choose(button, view.color === name, () => { view.color = name; draw(); })),
        el("span", { class: "gap" }), el("span", { class: "muted" }, "trained from version"),
        ...versions.map((version) =>
          choose(String(version), view.version === version, () => { view.version = version; draw(); }))),
      el("div", { class: "legend" }, ...COLORS[view.color].legend(scale),
        el("span", null, el("span", { class: "tok seen" }, "text"), SEEN),
        el("span", null, el("span", { class: "tok out" }, "text"), " " + OUT)),
      ...shown.map((sample) => sampleCard(sample, scale)));
  };
  draw();
  return box;
}

function scaleOf(samples) {
  const scale = { age: 1, advantage: 1e-9, logprob: 1 };
  for (const s of samples) {
    s.versions.forEach((version, i) => {
      if (version < 0) return;
      scale.age = Math.max(scale.age, s.train_version - version);
      scale.advantage = Math.max(scale.advantage, Math.abs(s.advantages[i] || 0));
      scale.logprob = Math.max(scale.logprob, -(s.logprobs[i] || 0));
    });
  }
  return scale;
}

function sampleCard(sample, scale) {
  const words = !sample.texts.some((text) => /^\s|\n/.test(text));
  const tokens = el("div", { class: "tokens mono" });
  let seen = [];
  const flush = () => {
    if (seen.length) {
      const text = seen.map((i) => shownText(sample, i)).join(words ? " " : "");
      const node = el("span", { class: words ? "tok seen word" : "tok seen" }, text);
      const first = seen[0], last = seen[seen.length - 1];
      hoverTip(node, SEEN, [[null, "tokens", `${first} to ${last}`]]);
      tokens.append(node);
    }
    seen = [];
  };
  sample.texts.forEach((_, i) => {
    if (i === sample.omitted_at) {
      flush();
      const number_ = sample.num_tokens - sample.texts.length;
      tokens.append(el("span", { class: "muted" }, ` … ${number_} tokens left out … `));
    }
    if (sample.versions[i] < 0) { seen.push(i); return; }
    flush();
    tokens.append(tokenNode(sample, i, words, scale));
  });
  flush();
  const facts = [`reward ${number(sample.reward)}`, `${sample.num_tokens} tokens`,
    `group ${sample.group_id}`];
  return el("section", { class: "card sample" },
    el("header", null, el("h3", null, { best: "highest reward", worst: "lowest reward",
      oldest: "oldest token" }[sample.why] || "at random"),
      el("span", { class: "unit" }, facts.join(" · "))), tokens);
}

function shownText(sample, i) {
  const text = sample.texts[i];
  return text === "" ? `⟨${sample.token_ids[i]}⟩` : text.replaceAll("\n", "↵\n");
}

function tokenNode(sample, i, words, scale) {
  const inLoss = sample.in_loss[i] === 1;
  const node = el("span", { class: ["tok", words ? "word" : "", inLoss ? "" : "out"].join(" ") },
    shownText(sample, i));
  if (inLoss) COLORS[view.color].paint(node, sample, i, scale);
  const logprob = sample.logprobs[i], age = sample.train_version - sample.versions[i];
  hoverTip(node, JSON.stringify(sample.texts[i]) + `, token ${sample.token_ids[i]}`, [
    [null, "logprob", number(logprob)],
    [null, "probability", quantity(Math.exp(logprob), "fraction")],
    [null, "sampled by version", `${sample.versions[i]} (staleness ${age})`],
    [null, "advantage", number(sample.advantages[i])],
    [null, "in the loss", inLoss ? "yes" : "no"],
  ]);
  return node;
}

function hoverTip(node, head, rows) {
  node.addEventListener("pointermove", (event) => showTip(event, head, rows));
  node.addEventListener("pointerleave", hideTip);
}

function paintAge(node, sample, i, scale) {
  const age = sample.train_version - sample.versions[i];
  node.classList.add("a" + Math.min(4, Math.round((4 * age) / Math.max(4, scale.age))));
}

function ageLegend(scale) {
  const shades = [...new Set([0, 1, 2, 3, 4].map((k) => Math.round((k * Math.max(4, scale.age)) / 4)))];
  return shades.filter((age) => age <= scale.age).map((age) => {
    const shade = Math.min(4, Math.round((4 * age) / Math.max(4, scale.age)));
    const words = age === 0 ? "newest version" : `${age} version${age > 1 ? "s" : ""} old`;
    return el("span", null, el("span", { class: `tok a${shade}` }, words));
  });
}

function mixed(color, share) {
  return `color-mix(in srgb, var(${color}) ${Math.round(100 * share)}%, transparent)`;
}

function paintAdvantage(node, sample, i, scale) {
  const value = sample.advantages[i] || 0;
  const share = Math.min(1, Math.abs(value) / scale.advantage);
  if (share) node.style.background = mixed(value > 0 ? "--pos" : "--neg", 0.12 + 0.5 * share);
}

function advantageLegend(scale) {
  return [[-1, "--neg"], [-0.5, "--neg"], [0.5, "--pos"], [1, "--pos"]].map(([share, color]) =>
    el("span", null, el("span", { class: "tok",
      style: { background: mixed(color, 0.12 + 0.5 * Math.abs(share)) } },
      (share > 0 ? "+" : "−") + number(Math.abs(share) * scale.advantage))));
}

function paintLogprob(node, sample, i) {
  node.style.background = mixed("--c3", 0.6 * (1 - Math.exp(sample.logprobs[i] || 0)));
}

function logprobLegend() {
  return [0.9, 0.5, 0.1].map((p) => el("span", null, el("span", { class: "tok",
    style: { background: mixed("--c3", 0.6 * (1 - p)) } }, `probability ${p}`)));
}
