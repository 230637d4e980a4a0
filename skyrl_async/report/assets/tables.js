// What is told in words: dropped groups, actions of the guard, checkpoints, configuration.
function drawDropped(dropped) {
  fillSection("Dropped groups", dropped.length ? [el("section", { class: "card wide" },
    table(["reason", "groups", "what happened", "what helps"], dropped.map((d) =>
      row(el("code", null, d.reason), d.groups.toLocaleString("en"), d.meaning, d.remedy))))] : []);
}

function drawGuard(actions) {
  const shown = actions.slice(-200);
  const hint = shown.length < actions.length ? `The last ${shown.length} of ${actions.length}.` : "";
  fillSection("Collapse guard", shown.length ? [el("section", { class: "card wide" },
    table(["step", "action", "because of"], shown.map((a) => row(String(a.step), a.action, a.cause))))] : [], hint);
}

function drawCheckpoints(checkpoints) {
  fillSection("Checkpoints", checkpoints.length ? [el("section", { class: "card wide" },
    table(["checkpoint", "policy version", "size", "written"], checkpoints.map((c) =>
      row(el("code", null, c.name), String(c.policy_version ?? "–"), quantity(c.size_bytes, "bytes"),
        (c.written_at || "not whole").replace("T", " ").replace("+00:00", " UTC")))))] : []);
}

function drawConfig(rows) {
  const changed = rows.filter((r) => r.default !== null);
  let all = false;
  const box = el("section", { class: "card wide" });
  const draw = () => {
    const shown = all ? rows : changed;
    const button = el("button", { "aria-pressed": String(all), onclick: () => { all = !all; draw(); } },
      all ? "show only what differs" : "show all keys");
    box.replaceChildren(
      el("div", { class: "bar" }, el("span", { class: "muted" },
        `${changed.length} of ${rows.length} keys differ from their defaults`), button),
      table(["key", "value", "default", "meaning"], shown.map((r) => {
        const line = row(el("code", null, r.key), el("code", null, r.value),
          el("code", { class: "muted" }, r.default ?? ""), r.meaning);
        line.className = r.default !== null ? "changed" : "";
        line.firstChild.classList.add("key");
        return line;
      })));
  };
  draw();
  fillSection("Configuration", rows.length ? [box] : []);
}
