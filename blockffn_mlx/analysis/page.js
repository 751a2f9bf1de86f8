"use strict";
// Everything that comes from a model or a text reaches the page as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const L = data.layers.length, E = data.experts, T = data.texts.length;
const bytes = (code) => Uint8Array.from(atob(code), (c) => c.charCodeAt(0));
const scores = bytes(data.scores), together = bytes(data.together);
const scoreAt = (layer, token, expert) => scores[(layer * T + token) * E + expert];
const find = (id) => document.getElementById(id);
const chosen = { token: 0, layer: 0, expert: 0, tint: "experts", order: "index" };

// How many experts each token uses in each layer.
const counts = Array.from({ length: L }, (_, layer) =>
  Array.from({ length: T }, (_, token) => {
    let n = 0;
    for (let e = 0; e < E; e++) n += scoreAt(layer, token, e) > 0;
    return n;
  }));
const most = Math.max(1, ...counts.map((row) => row.reduce((a, b) => Math.max(a, b), 0)));
const mean = (values) => {
  const known = values.filter((v) => v !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
};
const percent = (share) => (share === null ? "–" : (100 * share).toFixed(1) + "%");
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";

function make(tag, parent, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  if (parent) parent.append(element);
  return element;
}

// Colours: from the ground of the card to the strongest, for light and for dark screens.
const dark = matchMedia("(prefers-color-scheme: dark)");
const stops = () => dark.matches
  ? [[27, 35, 45], [33, 62, 98], [30, 112, 135], [96, 178, 120], [250, 227, 110]]
  : [[238, 242, 246], [184, 212, 232], [98, 161, 205], [34, 94, 154], [12, 36, 72]];
function color(share, alpha) {
  const ramp = stops(), at = Math.min(1, Math.max(0, share)) * (ramp.length - 1);
  const low = Math.min(ramp.length - 2, Math.floor(at)), part = at - low;
  const rgb = ramp[low].map((v, i) => Math.round(v + part * (ramp[low + 1][i] - v)));
  return `rgba(${rgb.join(",")},${alpha === undefined ? 1 : alpha})`;
}

// A map of cells: what it shows is drawn anew whenever the choice changes.
function cellMap(id, { columns, rows, value, tip, pick, marked, width = 12, height = 12 }) {
  const canvas = find(id), context = canvas.getContext("2d"), dpr = window.devicePixelRatio || 1;
  const cell = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / box.width * columns);
    const y = Math.floor((event.clientY - box.top) / box.height * rows);
    return x >= 0 && y >= 0 && x < columns && y < rows ? [x, y] : null;
  };
  canvas.onmousemove = (event) => { const at = cell(event); at ? show(event, tip(...at)) : hide(); };
  canvas.onmouseleave = hide;
  canvas.onclick = (event) => { const at = cell(event); if (at) pick(...at); };
  return () => {
    const wide = canvas.parentElement.clientWidth;
    const w = Math.max(3, Math.min(width, wide / columns)), h = height;
    canvas.width = Math.round(columns * w * dpr);
    canvas.height = Math.round(rows * h * dpr);
    canvas.style.width = columns * w + "px";
    canvas.style.height = rows * h + "px";
    context.scale(dpr, dpr);
    for (let y = 0; y < rows; y++) {
      for (let x = 0; x < columns; x++) {
        context.fillStyle = color(value(x, y));
        context.fillRect(x * w, y * h, w - (w > 6 ? 1 : 0), h - (h > 6 ? 1 : 0));
      }
    }
    context.strokeStyle = getComputedStyle(document.body).getPropertyValue("--mark");
    context.lineWidth = 1.5;
    const [x, y] = marked();
    if (x !== null) context.strokeRect(x * w - 0.5, 0.75, w, rows * h - 1.5);
    if (y !== null) context.strokeRect(0.75, y * h - 0.5, columns * w - 1.5, h);
  };
}

function show(event, text) {
  const tip = find("tip");
  tip.textContent = text;
  tip.style.opacity = 1;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  const below = event.clientY + 18;
  const fits = below + tip.offsetHeight < innerHeight;
  tip.style.top = (fits ? below : event.clientY - tip.offsetHeight - 12) + "px";
}
function hide() { find("tip").style.opacity = 0; }

function about(token) {
  const nats = data.nats[token];
  const total = counts.reduce((sum, row) => sum + row[token], 0);
  const seen = nats === null ? "" : `, ${nats.toFixed(2)} nats`;
  return `“${visible(data.texts[token])}”, token ${token}: ${total} of ${L * E} experts${seen}`;
}
const layerName = (layer) => String(data.layers[layer]);

let order = [];
function reorder() {
  order = Array.from({ length: E }, (_, e) => e);
  const share = data.share[chosen.layer];
  if (chosen.order === "use") order.sort((a, b) => share[b] - share[a]);
}

const tall = Math.max(5, Math.min(12, 620 / E));
const maps = [
  cellMap("depth", {
    columns: T, rows: L, height: 16,
    value: (x, y) => Math.sqrt(counts[y][x] / most),
    tip: (x, y) => `Layer ${layerName(y)}: ${counts[y][x]} of ${E} experts\n${about(x)}`,
    pick: (token, layer) => choose({ token, layer }),
    marked: () => [chosen.token, chosen.layer],
  }),
  cellMap("scores", {
    columns: T, rows: E, height: tall,
    value: (x, y) => Math.sqrt(scoreAt(chosen.layer, x, order[y]) / 255),
    tip: (x, y) => {
      const score = scoreAt(chosen.layer, x, order[y]) / 255 * data.scale[chosen.layer];
      const what = score ? `score ${score.toPrecision(2)}` : "idle";
      return `Layer ${layerName(chosen.layer)}, expert ${order[y]}: ${what}\n${about(x)}`;
    },
    pick: (token, y) => choose({ token, expert: order[y] }),
    marked: () => [chosen.token, order.indexOf(chosen.expert)],
  }),
  cellMap("share", {
    columns: E, rows: L, height: 16, width: 20,
    value: (x, y) => data.share[y][x],
    tip: (x, y) => `Layer ${layerName(y)}, expert ${x}: ${percent(data.share[y][x])} of all tokens`,
    pick: (expert, layer) => choose({ expert, layer }),
    marked: () => [chosen.expert, chosen.layer],
  }),
  cellMap("together", {
    columns: E, rows: E, height: tall, width: 12,
    value: (x, y) => (x === y ? 0 : company(y, x)),
    tip: (x, y) => `${percent(company(y, x))} of the tokens that use expert ${y} use ${x}, too`,
    pick: (x, y) => choose({ expert: y }),
    marked: () => [null, chosen.expert],
  }),
];
const company = (expert, other) => together[(chosen.layer * E + expert) * E + other] / 255;

function tabs(id, names, key) {
  for (const [value, label] of names) {
    const button = make("button", find(id), label);
    button.dataset.value = value;
    button.onclick = () => choose({ [key]: value });
  }
  return () => {
    for (const button of find(id).children) {
      button.setAttribute("aria-pressed", button.dataset.value === String(chosen[key]));
    }
  };
}
const groups = [
  tabs("tint", [["experts", "experts in use"], ["nats", "surprise"], ["plain", "plain"]], "tint"),
  tabs("order", [["index", "by number"], ["use", "by use"]], "order"),
  tabs("layers", data.layers.map((name, i) => [i, String(name)]), "layer"),
];

const spans = data.texts.map((text, token) => {
  if (data.names.length > 1 && data.documents[token] !== data.documents[token - 1]) {
    make("span", find("text"), data.names[data.documents[token]], "document");
  }
  const span = make("span", find("text"), text === "" ? "∅" : text);
  span.onmousemove = (event) => show(event, about(token));
  span.onmouseleave = hide;
  span.onclick = () => choose({ token });
  return span;
});
const totals = data.texts.map((_, token) => counts.reduce((sum, row) => sum + row[token], 0));
const tints = { experts: totals, nats: data.nats.map((n) => n || 0) };
function tintText() {
  const values = tints[chosen.tint] || [0];
  const least = Math.min(...values), span = Math.max(...values) - least || 1;
  spans.forEach((element, token) => {
    const share = (values[token] - least) / span;
    element.style.background = chosen.tint === "plain" ? "none" : color(share * 0.62, 0.8);
    element.classList.toggle("chosen", token === chosen.token);
  });
}

function showExpert() {
  const { layer, expert } = chosen, found = data.strongest[layer][expert];
  find("expert").textContent = `Expert ${expert} of layer ${layerName(layer)}`;
  find("expert-facts").textContent = `In use at ${percent(data.share[layer][expert])} of all tokens.`;
  find("top-tokens").replaceChildren(...found.tokens.map(([text, count]) => {
    const chip = make("span", null, visible(text), "chip");
    make("small", chip, `${count}×`);
    return chip;
  }));
  find("contexts").replaceChildren(...found.contexts.map(([score, before, token, after]) => {
    const row = make("div", null, undefined, "context");
    make("span", row, score.toPrecision(3));
    const text = make("span", row, visible(before));
    make("mark", text, visible(token));
    text.append(visible(after));
    return row;
  }));
  if (!found.contexts.length) find("contexts").textContent = "No token uses it.";
  const share = data.share[layer], lift = (e) => company(expert, e) / Math.max(share[e], 1e-9);
  const others = Array.from({ length: E }, (_, e) => e)
    .filter((e) => e !== expert && company(expert, e) > 0.02 && lift(e) > 1.005);
  others.sort((a, b) => lift(b) - lift(a));
  find("partners").replaceChildren(
    ...others.slice(0, 10).map((e) => expertChip(layer, e, `${lift(e).toFixed(2)}×`)));
  if (!others.length) find("partners").textContent = "None that is with it more than by chance.";
}

function expertChip(layer, expert, note) {
  const chip = make("button", null, String(expert), "chip");
  make("small", chip, note);
  chip.onclick = () => choose({ layer, expert });
  return chip;
}

function showToken() {
  const { token } = chosen;
  find("token-facts").textContent = about(token);
  find("token").replaceChildren(...data.layers.map((name, layer) => {
    const row = make("div", null, undefined, "row");
    make("span", row, String(name));
    const chips = make("div", row, undefined, "chips");
    const active = [];
    for (let e = 0; e < E; e++) if (scoreAt(layer, token, e)) active.push(e);
    active.sort((a, b) => scoreAt(layer, token, b) - scoreAt(layer, token, a));
    chips.append(...active.map((e) => expertChip(
      layer, e, (scoreAt(layer, token, e) / 255 * data.scale[layer]).toPrecision(2))));
    return row;
  }));
}

function drawUnion() {
  const svg = find("union"), box = { left: 44, top: 12, width: 460, height: 244 };
  const draw = (tag, attributes, text, name) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    if (name) element.setAttribute("class", name);
    svg.append(element);
    return element;
  };
  svg.replaceChildren();
  const x = (i) => box.left + box.width * (data.lengths.length > 1 ? i / (data.lengths.length - 1) : 0.5);
  const y = (share) => box.top + box.height * (1 - share);
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    draw("line", { x1: box.left, x2: box.left + box.width, y1: y(share), y2: y(share) }, undefined, "grid");
    draw("text", { x: box.left - 8, y: y(share) + 4, "text-anchor": "end" }, `${100 * share}%`);
  }
  const line = (values) => values.map((v, i) => `${i ? "L" : "M"}${x(i)} ${y(v)}`).join("");
  const each = (layer) => data.unions.map((row) => row[layer]);
  for (let layer = 0; layer < L; layer++) {
    draw("path", { d: line(each(layer)) }, undefined, layer === chosen.layer ? "chosen" : "");
  }
  const means = data.unions.map(mean);
  draw("path", { d: line(means) }, undefined, "mean");
  means.forEach((share, i) => {
    const dot = draw("circle", { cx: x(i), cy: y(share), r: 4.5 });
    const own = percent(data.unions[i][chosen.layer]);
    dot.onmousemove = (event) => show(event, `Chunks of ${data.lengths[i]}: ${percent(share)} of the `
      + `experts\nlayer ${layerName(chosen.layer)}: ${own}`);
    dot.onmouseleave = hide;
    draw("text", { x: x(i), y: box.top + box.height + 20, "text-anchor": "middle" }, data.lengths[i]);
  });
  draw("text", { x: box.left + box.width / 2, y: 296, "text-anchor": "middle" }, "tokens in a chunk");
}

function drawTable() {
  const table = find("table");
  table.replaceChildren();
  const head = make("tr", make("thead", table));
  for (const name of ["layer", "TLS", `CLS_${data.chunk}`, "reuse", "experts a token"]) {
    make("th", head, name);
  }
  const body = make("tbody", table);
  const line = (name, i, values) => {
    const row = make("tr", body);
    for (const value of [name, ...values.map(percent)]) make("td", row, value);
    const shares = i === null ? data.share.flat() : data.share[i];
    make("td", row, (mean(shares) * E).toFixed(1));
    if (i !== null) row.onclick = () => choose({ layer: i });
    row.classList.toggle("chosen", i === chosen.layer);
  };
  for (let i = 0; i < L; i++) line(layerName(i), i, [data.tls[i], data.cls[i], data.reuse[i]]);
  line("mean", null, [data.tls, data.cls, data.reuse].map(mean));
}

function drawRamps() {
  for (const ramp of document.querySelectorAll("[data-ramp]")) {
    const [low, high] = ramp.dataset.ramp.split("|");
    const bar = make("i");
    bar.style.background = `linear-gradient(90deg,${[0, 0.25, 0.5, 0.75, 1].map((s) => color(s)).join()})`;
    ramp.replaceChildren(low, bar, high);
  }
}

function choose(change) {
  Object.assign(chosen, change);
  chosen.layer = Number(chosen.layer);
  reorder();
  for (const name of document.querySelectorAll(".layer")) name.textContent = layerName(chosen.layer);
  for (const draw of [...groups, ...maps, tintText, showExpert, showToken, drawUnion, drawTable]) draw();
  follow();
}

find("title").textContent = data.title;
const kept = T < data.tokens ? `; the maps show the first ${T.toLocaleString("en")}` : "";
find("sources").textContent = `${data.names.slice(0, 4).join(", ")}`
  + (data.names.length > 4 ? ` and ${data.names.length - 4} more` : "")
  + ` · ${data.tokens.toLocaleString("en")} tokens${kept}`;
const tiles = [["TLS", percent(mean(data.tls))], [`CLS_${data.chunk}`, percent(mean(data.cls))],
  ["reuse", percent(mean(data.reuse))],
  ["experts a token", `${(mean(data.share.flat()) * E).toFixed(1)} of ${E}`],
  ...Object.entries(data.facts)];
for (const [name, value] of tiles) {
  const tile = make("div", find("tiles"), undefined, "tile");
  make("b", tile, value);
  make("span", tile, name);
}
find("text").onkeydown = (event) => {
  const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
  if (!step) return;
  event.preventDefault();
  choose({
    token: Math.min(T - 1, Math.max(0, chosen.token + step[0])),
    layer: Math.min(L - 1, Math.max(0, chosen.layer + step[1])),
  });
  spans[chosen.token].scrollIntoView({ block: "nearest" });
};
// Both maps of tokens move together, and follow the chosen token.
const tracks = ["depth", "scores"].map((id) => find(id).parentElement);
for (const track of tracks) {
  track.onscroll = () => { for (const other of tracks) other.scrollLeft = track.scrollLeft; };
}
function follow() {
  const [track] = tracks, at = chosen.token / T * track.scrollWidth;
  if (at < track.scrollLeft || at > track.scrollLeft + track.clientWidth - 12) {
    track.scrollLeft = at - track.clientWidth / 2;
  }
}
const redraw = () => { drawRamps(); choose({}); };
dark.addEventListener("change", redraw);
addEventListener("resize", redraw);
// Begins in the middle, with an expert that is neither always on nor never.
const first = Math.floor(L / 2), apt = data.share[first].map((share) => Math.abs(share - 0.25));
choose({ layer: first, expert: apt.indexOf(Math.min(...apt)) });
drawRamps();
