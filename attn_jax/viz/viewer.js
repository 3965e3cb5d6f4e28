"use strict";
// One page for the weights of one or several models. Everything drawn is SVG, so that what is saved
// is what is seen; cells of a matrix are one image, a pixel each.
const DATA = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg";
// cividis and PuOr: told apart without red and green
const SEQUENTIAL = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const DIVERGING = ["#b35806", "#e08214", "#fdb863", "#fee0b6", "#f7f7f7", "#d8daeb", "#b2abd2", "#8073ac", "#542788"];
const LEAST_LINE = 0.005;
const MOST_LINES = 6000;
const $ = (id) => document.getElementById(id);
const state = { part: 0, layer: 0, head: 0, view: "matrix", a: 0, b: -1, difference: false, scale: "largest", cursor: null };

// --- data

function bytes(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}

/** Weights of one attention, decoded when they are first asked for. */
function weights(one) {
  if (!one.values) one.values = new Float32Array(bytes(one.data).buffer);
  return one.values;
}

function matrix(one, head) {
  const size = one.queries.length * one.keys.length;
  return weights(one).subarray(head * size, (head + 1) * size);
}

const parts = () => [...new Set(DATA.models.flatMap((m) => m.attentions.map((x) => x.part)))];
function layers(part) {
  const all = DATA.models.flatMap((m) => m.attentions.filter((x) => x.part === part));
  return [...new Set(all.map((x) => x.layer))].sort((x, y) => x - y);
}
function find(model, part, layer) {
  return model < 0 ? undefined : DATA.models[model].attentions.find((x) => x.part === part && x.layer === layer);
}
const part = () => parts()[state.part];
const layer = () => layers(part())[state.layer];
const heads = () => Math.max(...DATA.models.flatMap((m) => m.attentions.filter((x) => x.part === part()).map((x) => x.heads)));

/** A difference has a place only where both have the same tokens. */
function comparable(one, other) {
  return one && other && one.queries.join("\u0000") === other.queries.join("\u0000") && one.keys.join("\u0000") === other.keys.join("\u0000");
}

/** What each pane shows of a layer and a head: {name, one, values, signed}. */
function shown(layer, head) {
  const found = [];
  for (const [side, model] of [["A", state.a], ["B", state.b]]) {
    const one = find(model, part(), layer);
    if (model < 0) continue;
    const there = one && head < one.heads;
    const values = there ? matrix(one, head) : null;
    // what no softmax made weights of may be negative, and has colours of both signs
    found.push({ side, name: DATA.models[model].name, one, values, signed: Boolean(values) && values.some((x) => x < 0), difference: false });
  }
  // one scale for both, so that equal weights have equal colours
  const all = found.filter((pane) => pane.values).map((pane) => largest(pane.values, true));
  for (const pane of found) pane.most = Math.max(...all);
  if (state.difference && found.length === 2) {
    const [x, y] = found;
    const both = x.values && y.values && comparable(x.one, y.one);
    const values = both ? x.values.map((value, i) => value - y.values[i]) : null;
    found.push({ side: "A \u2212 B", name: `${x.name} \u2212 ${y.name}`, one: x.one, values, signed: true, difference: true, most: values && largest(values, true) });
  }
  return found;
}

// --- numbers and colours

/** As many digits as a float32 has. */
const number = (value) => String(Number(value.toPrecision(8)));
const short = (value) => Number(value.toPrecision(3)).toString();

function blend(stops, at) {
  const place = Math.min(Math.max(at, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2), share = place - low;
  const channel = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  return [0, 1, 2].map((i) => Math.round(channel(stops[low], i) * (1 - share) + channel(stops[low + 1], i) * share));
}

function ramp(signed) {
  const stops = signed ? DIVERGING : SEQUENTIAL;
  return Array.from({ length: 256 }, (_, i) => blend(stops, i / 255));
}
const RAMPS = { plain: ramp(false), signed: ramp(true) };

function largest(values, signed) {
  let most = 0;
  for (const value of values) {
    const size = signed ? Math.abs(value) : value;
    if (size > most) most = size;
  }
  return most || 1;
}

/** From a value to 0..1 along the colours, and what their ends mean. */
function scaleOf({ most: own, signed }) {
  const most = state.scale === "one" ? 1 : own;
  const root = state.scale === "root";
  const bend = (x) => (root ? Math.sqrt(Math.min(Math.max(x, 0), 1)) : x);
  const place = signed
    ? (v) => 0.5 + (Math.sign(v) * bend(Math.abs(v) / most)) / 2
    : (v) => bend(v / most);
  return { place, most, root };
}

function image(pane) {
  const { values, signed } = pane, width = pane.one.keys.length, height = pane.one.queries.length;
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), pixels = context.createImageData(width, height);
  const { place } = scaleOf(pane), colours = signed ? RAMPS.signed : RAMPS.plain;
  for (let i = 0; i < values.length; i++) {
    const at = place(values[i]);
    const [r, g, b] = Number.isFinite(at) ? colours[Math.round(Math.min(Math.max(at, 0), 1) * 255)] : [128, 128, 128];
    pixels.data.set([r, g, b, 255], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}

// --- SVG

function make(name, attributes = {}, text) {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function picture(width, height, label) {
  return make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, tabindex: 0 });
}

function cells(pane, box) {
  return make("image", { href: image(pane), preserveAspectRatio: "none", style: "image-rendering: pixelated", ...box });
}

const clip = (token, most = 14) => (token.length > most ? token.slice(0, most - 1) + "\u2026" : token);
const room = (tokens) => 10 + 7 * Math.min(14, Math.max(...tokens.map((token) => token.length)));

function say(text) {
  $("readout").textContent = text;
}

function told(pane, query, key, value) {
  const { queries, keys } = pane.one;
  return `${pane.side} ${pane.name}: query ${place(queries, query, pane.one.bins[0])}, key ${place(keys, key, pane.one.bins[1])}: ${number(value)}`;
}

function place(tokens, index, bin) {
  return bin > 1 ? `tokens ${tokens[index]}` : `${index} \u201c${tokens[index]}\u201d`;
}

/** A bar of colours with its ends. */
function legend(svg, pane, x, y, width) {
  const { most, root } = scaleOf(pane);
  const colours = pane.signed ? RAMPS.signed : RAMPS.plain;
  for (let i = 0; i < 64; i++) {
    const [r, g, b] = colours[4 * i];
    svg.append(make("rect", { x: x + (width * i) / 64, y, width: width / 64 + 0.5, height: 8, fill: `rgb(${r},${g},${b})` }));
  }
  const signs = pane.difference ? [`B by ${short(most)}`, `A by ${short(most)}`] : [short(-most), short(most)];
  const ends = pane.signed ? signs : ["0", short(most)];
  svg.append(make("text", { x, y: y + 20, "font-size": 11, class: "faint" }, ends[0]));
  svg.append(make("text", { x: x + width, y: y + 20, "font-size": 11, "text-anchor": "end", class: "faint" }, ends[1] + (root ? " (square root)" : "")));
}

// --- the matrix of one head

function drawMatrix(pane) {
  const { queries, keys } = pane.one, left = room(queries) + 18, top = room(keys) * 0.75 + 24;
  const cell = Math.max(1, Math.min(22, Math.floor(440 / Math.max(queries.length, keys.length))));
  const width = cell * keys.length, height = cell * queries.length;
  const svg = picture(left + Math.max(width, 130) + 40, top + height + 40, `${pane.name}: weights of queries (rows) over keys (columns)`);
  svg.append(cells(pane, { x: left, y: top, width, height }));
  svg.append(make("rect", { x: left, y: top, width, height, class: "frame" }));
  const size = Math.max(7, Math.min(12, cell - 2)), every = Math.ceil(9 / cell);
  queries.forEach((token, i) => {
    if (i % every) return;
    svg.append(make("text", { x: left - 4, y: top + (i + 0.5) * cell + size / 3, "font-size": size, "text-anchor": "end" }, clip(token)));
  });
  keys.forEach((token, i) => {
    if (i % every) return;
    const x = left + (i + 0.5) * cell + size / 3, y = top - 4;
    svg.append(make("text", { x, y, "font-size": size, transform: `rotate(-55 ${x} ${y})` }, clip(token)));
  });
  svg.append(make("text", { x: left + width, y: 12, "font-size": 11, "text-anchor": "end", class: "faint" }, "keys \u2192"));
  svg.append(make("text", { x: 12, y: top + height, "font-size": 11, transform: `rotate(-90 12 ${top + height})`, class: "faint" }, "\u2190 queries"));
  legend(svg, pane, left, top + height + 12, Math.max(width, 130));
  const cursor = make("rect", { width: cell, height: cell, class: "cursor", visibility: "hidden" });
  svg.append(cursor);
  const show = (q, k) => {
    state.cursor = [q, k];
    cursor.setAttribute("x", left + k * cell);
    cursor.setAttribute("y", top + q * cell);
    cursor.setAttribute("visibility", "visible");
    say(told(pane, q, k, pane.values[q * keys.length + k]));
  };
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect();
    const k = Math.floor((event.clientX - box.left - left) / cell), q = Math.floor((event.clientY - box.top - top) / cell);
    if (k >= 0 && q >= 0 && k < keys.length && q < queries.length) show(q, k);
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [q, k] = state.cursor || [step[0] > 0 ? -1 : 0, step[1] > 0 ? -1 : 0];
    const within = (x, most) => Math.min(Math.max(x, 0), most - 1);
    show(within(q + step[0], queries.length), within(k + step[1], keys.length));
  });
  return svg;
}

// --- lines from queries to keys

function drawLines(pane) {
  const { queries, keys } = pane.one, row = 17, left = room(queries) + 8, right = room(keys), gap = 150;
  const height = row * Math.max(queries.length, keys.length) + 40;
  const svg = picture(left + gap + right + 16, height, `${pane.name}: a line from each query (left) to each key (right), as dark as its weight`);
  svg.append(make("text", { x: left, y: 12, "font-size": 11, "text-anchor": "end", class: "faint" }, "queries"));
  svg.append(make("text", { x: left + gap, y: 12, "font-size": 11, class: "faint" }, "keys"));
  const lines = [], y = (i) => 30 + i * row;
  pane.values.forEach((value, i) => {
    const size = Math.abs(value);
    if (size >= LEAST_LINE) lines.push([size, i]);
  });
  lines.sort((x, y) => y[0] - x[0]);
  const most = pane.signed ? pane.most : Math.max(1, pane.most), drawn = [];
  for (const [size, i] of lines.slice(0, MOST_LINES)) {
    const q = Math.floor(i / keys.length), k = i % keys.length;
    const line = make("line", {
      x1: left + 4, y1: y(q) - 4, x2: left + gap - 4, y2: y(k) - 4, "stroke-width": 2,
      "stroke-opacity": Math.min(1, size / most), class: (pane.difference ? pane.values[i] < 0 : pane.side === "B") ? "b" : "a",
      "stroke-dasharray": !pane.difference && pane.values[i] < 0 ? "4 3" : "none",
    });
    drawn.push({ line, q, k, opacity: Math.min(1, size / most) });
    svg.append(line);
  }
  const labels = { q: [], k: [] };
  const choose = (kind, index) => {
    for (const one of drawn) {
      const on = one[kind] === index;
      one.line.setAttribute("stroke-opacity", on ? one.opacity : one.opacity * 0.06);
    }
    for (const group of ["q", "k"]) labels[group].forEach((label, i) => label.classList.toggle("on", group === kind && i === index));
    const others = kind === "q" ? keys : queries;
    const value = (i) => pane.values[kind === "q" ? index * keys.length + i : i * keys.length + index];
    const order = [...others.keys()].sort((x, y) => Math.abs(value(y)) - Math.abs(value(x))).slice(0, 6);
    const bins = pane.one.bins;
    const whom = kind === "q" ? `query ${place(queries, index, bins[0])} looks at` : `key ${place(keys, index, bins[1])} is seen by`;
    say(`${pane.side} ${pane.name}: ${whom} ` + order.map((i) => `${place(others, i, bins[kind === "q" ? 1 : 0])}: ${number(value(i))}`).join(", "));
  };
  const leave = () => {
    for (const one of drawn) one.line.setAttribute("stroke-opacity", one.opacity);
    for (const group of ["q", "k"]) labels[group].forEach((label) => label.classList.remove("on"));
  };
  for (const [kind, tokens, x, anchor] of [["q", queries, left, "end"], ["k", keys, left + gap, "start"]]) {
    tokens.forEach((token, i) => {
      const label = make("text", { x, y: y(i), "font-size": 12, "text-anchor": anchor, class: "token" }, clip(token));
      label.addEventListener("mouseenter", () => choose(kind, i));
      label.addEventListener("mouseleave", leave);
      labels[kind].push(label);
      svg.append(label);
    });
  }
  let at = null;
  svg.addEventListener("keydown", (event) => {
    const known = { ArrowUp: -1, ArrowDown: 1, ArrowLeft: "q", ArrowRight: "k" }[event.key];
    if (event.key === "Escape") { at = null; leave(); return; }
    if (known === undefined) return;
    event.preventDefault();
    at = at || { kind: "q", index: known === 1 ? -1 : 0 };
    if (typeof known === "string") at.kind = known;
    else at.index += known;
    const tokens = at.kind === "q" ? queries : keys;
    at.index = Math.min(Math.max(at.index, 0), tokens.length - 1);
    choose(at.kind, at.index);
  });
  return svg;
}

// --- all layers and heads

function drawModel(panes, side) {
  const all = layers(part()), columns = heads(), size = Math.max(36, Math.min(110, Math.floor(560 / columns)));
  const left = 46, top = 34, gap = 8;
  const first = panes.find((pane) => pane.side === side);
  const svg = picture(left + columns * (size + gap), top + all.length * (size + gap), `${first.name}: every layer (row) and head (column)`);
  const thumbs = [];
  for (let head = 0; head < columns; head++) {
    svg.append(make("text", { x: left + head * (size + gap) + size / 2, y: top - 8, "font-size": 11, "text-anchor": "middle", class: "faint" }, `head ${head}`));
  }
  all.forEach((name, row) => {
    svg.append(make("text", { x: left - 6, y: top + row * (size + gap) + size / 2, "font-size": 11, "text-anchor": "end", class: "faint" }, `layer ${name}`));
    for (let head = 0; head < columns; head++) {
      const pane = shown(name, head).find((one) => one.side === side);
      if (!pane || !pane.values) continue;
      const box = { x: left + head * (size + gap), y: top + row * (size + gap), width: size, height: size };
      const thumb = cells(pane, box);
      thumb.classList.add("thumb");
      thumb.append(make("title", {}, `layer ${name}, head ${head}`));
      const frame = make("rect", { ...box, class: "frame" });
      const line = `${side} ${pane.name}: layer ${name}, head ${head}: largest ${number(largest(pane.values, pane.signed))}`;
      thumb.addEventListener("mouseenter", () => say(`${line}; a click opens it`));
      thumb.addEventListener("click", () => open(row, head));
      thumbs.push({ row, head, box, line });
      svg.append(thumb, frame);
    }
  });
  const cursor = make("rect", { class: "cursor", visibility: "hidden" });
  svg.append(cursor);
  let at = null;
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && at) { open(at.row, at.head); return; }
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || !thumbs.length) return;
    event.preventDefault();
    const to = at && thumbs.find((one) => one.row === at.row + step[0] && one.head === at.head + step[1]);
    at = to || at || thumbs[0];
    const { box, line } = at;
    for (const [key, value] of Object.entries(box)) cursor.setAttribute(key, value);
    cursor.setAttribute("visibility", "visible");
    say(`${line}; Enter opens it`);
  });
  return svg;
}

function open(row, head) {
  Object.assign(state, { layer: row, head, view: "matrix", cursor: null });
  refresh();
}

// --- mean weight by relative position

function drawProfile() {
  const panes = shown(layer(), state.head).filter((pane) => !pane.difference && pane.values);
  const width = 620, height = 190, left = 52, bottom = 34, top = 10;
  const svg = picture(width, height, "Mean weight of keys by relative position");
  const curves = panes.map((pane) => ({ pane, r: pane.one.profile.relative, w: pane.one.profile.weight[state.head] }));
  const seen = curves.flatMap(({ r, w }) => r.filter((_, i) => w[i] !== null && Math.abs(w[i]) > 1e-4));
  if (!seen.length) return svg;
  const low = Math.min(...seen, -1), high = Math.max(...seen, 1);
  const most = Math.max(...curves.flatMap(({ w }) => w.filter((x) => x !== null)), 1e-6);
  const x = (r) => left + ((r - low) / (high - low)) * (width - left - 12);
  const least = Math.min(0, ...curves.flatMap(({ w }) => w.filter((x) => x !== null)));
  const y = (w) => top + ((most - w) / (most - least)) * (height - top - bottom);
  svg.append(make("path", { d: `M${left} ${top}V${height - bottom}H${width - 12}`, class: "axis" }));
  for (const tick of [least, (most + least) / 2, most]) svg.append(make("text", { x: left - 6, y: y(tick) + 4, "font-size": 11, "text-anchor": "end", class: "faint" }, short(tick)));
  for (const tick of [...new Set([low, Math.round(low / 2), 0, Math.round(high / 2), high])]) {
    svg.append(make("text", { x: x(tick), y: height - bottom + 14, "font-size": 11, "text-anchor": "middle", class: "faint" }, String(tick)));
  }
  svg.append(make("text", { x: (left + width) / 2, y: height - 4, "font-size": 11, "text-anchor": "middle", class: "faint" }, "relative position: key less query"));
  for (const { pane, r, w } of curves) {
    const points = r.map((one, i) => [one, w[i]]).filter(([one, v]) => v !== null && one >= low && one <= high);
    const kind = pane.side === "B" ? "b" : "a";
    svg.append(make("path", { d: "M" + points.map(([one, v]) => `${x(one).toFixed(2)} ${y(v).toFixed(2)}`).join("L"), class: kind, fill: "none", "stroke-width": 1.8, "stroke-dasharray": kind === "b" ? "5 3" : "none" }));
    if (points.length < 80) for (const [one, v] of points) svg.append(make("circle", { cx: x(one), cy: y(v), r: 2.4, class: kind, fill: "none" }));
  }
  curves.forEach(({ pane }, i) => {
    const at = top + 10 + 16 * i, kind = pane.side === "B" ? "b" : "a";
    svg.append(make("line", { x1: width - 180, x2: width - 156, y1: at - 4, y2: at - 4, class: kind, "stroke-width": 1.8, "stroke-dasharray": kind === "b" ? "5 3" : "none" }));
    svg.append(make("text", { x: width - 150, y: at, "font-size": 12 }, `${pane.side} ${pane.name}`));
  });
  let at = null;
  const show = (r) => {
    at = Math.min(Math.max(r, low), high);
    say(`at ${at}: ` + curves.map(({ pane, r, w }) => `${pane.side} ${pane.name} ${w[r.indexOf(at)] == null ? "no such key" : number(w[r.indexOf(at)])}`).join(", "));
  };
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect();
    show(Math.round(low + ((event.clientX - box.left - left) / (width - left - 12)) * (high - low)));
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(at === null ? 0 : at + step);
  });
  return svg;
}

// --- the page

function fill(select, names, chosen) {
  select.replaceChildren(...names.map(([value, name]) => {
    const option = document.createElement("option");
    option.value = value;
    option.textContent = name;
    return option;
  }));
  select.value = chosen;
}

function within(value, count) {
  return ((value % count) + count) % count;
}

function refresh() {
  state.part = within(state.part, parts().length);
  state.layer = Math.min(state.layer, layers(part()).length - 1);
  state.head = Math.min(state.head, heads() - 1);
  fill($("part"), parts().map((name, i) => [i, name]), state.part);
  fill($("layer"), layers(part()).map((name, i) => [i, name]), state.layer);
  fill($("head"), Array.from({ length: heads() }, (_, i) => [i, i]), state.head);
  fill($("a"), DATA.models.map((model, i) => [i, model.name]), state.a);
  fill($("b"), [[-1, "none"], ...DATA.models.map((model, i) => [i, model.name])], state.b);
  $("view").value = state.view;
  $("scale").value = state.scale;
  $("difference").checked = state.difference;
  $("difference").disabled = state.b < 0;
  say("");
  // the picture that had the focus is drawn anew: the keyboard stays where it was
  const focused = [...document.querySelectorAll("#panes svg, #profile svg")].indexOf(document.activeElement);
  const panes = shown(layer(), state.head);
  $("panes").replaceChildren(...panes.map((pane) => framed(pane, panes)));
  $("profile").replaceChildren(drawProfile());
  $("note").textContent = note(panes);
  if (focused >= 0) document.querySelectorAll("#panes svg, #profile svg")[focused]?.focus();
}

function framed(pane, panes) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption"), box = document.createElement("div");
  caption.textContent = panes.length > 1 ? `${pane.side} \u2013 ${pane.name}` : pane.name;
  box.className = "picture";
  if (state.view === "model") box.append(drawModel(panes, pane.side));
  else if (!pane.values) box.textContent = pane.difference ? "The two have not the same tokens here, or one has no such head." : "This model has no such attention or head.";
  else box.append(state.view === "lines" ? drawLines(pane) : drawMatrix(pane));
  figure.append(caption, box);
  return figure;
}

function note(panes) {
  const own = state.view === "model" && state.scale === "largest" ? "Each head has a scale of its own. " : "";
  const found = panes.find((pane) => pane.one && pane.one.bins.some((bin) => bin > 1));
  const lines = state.view === "lines" ? `Lines are as dark as weights; those below ${LEAST_LINE} are left out, and all but the ${MOST_LINES} strongest. ` : "";
  if (!found) return own + lines + "Each row of weights sums to what its normaliser says: one, for softmax.";
  const [q, k] = found.one.bins;
  return own + lines + `The input is long: a cell is the weight of ${k} keys together, in the mean of ${q} queries, so that rows still sum to what they did.`;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

// --- saving

/** What is seen, as one SVG with its colours in it. */
function drawing() {
  const figures = [...document.querySelectorAll("#panes figure")], style = getComputedStyle(document.documentElement);
  const css = [...document.styleSheets[0].cssRules].filter((rule) => rule.selectorText && rule.selectorText.startsWith("svg")).map((rule) => rule.cssText).join(" ");
  const resolved = css.replace(/var\((--[a-z]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
  const root = make("svg", { xmlns: NS });
  root.append(make("style", {}, resolved));
  const paper = make("rect", { width: "100%", height: "100%", fill: style.getPropertyValue("--paper").trim() });
  root.append(paper);
  let x = 12, height = 0;
  for (const figure of [...figures, $("profile").parentElement]) {
    const svg = figure.querySelector("svg");
    if (!svg) continue;
    const [w, h] = [Number(svg.getAttribute("width")), Number(svg.getAttribute("height"))];
    const heading = figure.querySelector("figcaption, h2").textContent;
    root.append(make("text", { x, y: 20, "font-size": 14, "font-weight": 600 }, heading));
    const copy = svg.cloneNode(true);
    copy.querySelectorAll(".cursor").forEach((node) => node.remove());
    for (const [key, value] of [["x", x], ["y", 30]]) copy.setAttribute(key, value);
    root.append(copy);
    x += w + 20;
    height = Math.max(height, h + 42);
  }
  for (const [key, value] of [["width", x], ["height", height], ["viewBox", `0 0 ${x} ${height}`]]) root.setAttribute(key, value);
  return { text: new XMLSerializer().serializeToString(root), width: x, height };
}

function fileName(kind) {
  const words = [part(), `layer ${layer()}`, `head ${state.head}`, state.view];
  return words.join(" ").replace(/[^A-Za-z0-9]+/g, "_") + "." + kind;
}

function save(blob, kind) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = fileName(kind);
  link.click();
  say(`saved ${link.download}`);
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function saveSvg() {
  save(new Blob([drawing().text], { type: "image/svg+xml" }), "svg");
}

function savePng() {
  const { text, width, height } = drawing(), loaded = new Image();
  loaded.onload = () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [2 * width, 2 * height];
    canvas.getContext("2d").drawImage(loaded, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(blob, "png"), "image/png");
  };
  loaded.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
}

// --- controls

function set(changes) {
  Object.assign(state, { cursor: null }, changes);
  refresh();
}

function toggleHelp() {
  const help = $("help");
  help.hidden = !help.hidden;
  $("keys").setAttribute("aria-expanded", String(!help.hidden));
}

for (const name of ["part", "layer", "head", "a", "b"]) $(name).addEventListener("change", (event) => set({ [name]: Number(event.target.value) }));
for (const name of ["view", "scale"]) $(name).addEventListener("change", (event) => set({ [name]: event.target.value }));
$("difference").addEventListener("change", (event) => set({ difference: event.target.checked }));
const swapTheme = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
$("theme").addEventListener("click", swapTheme);
$("svg").addEventListener("click", saveSvg);
$("png").addEventListener("click", savePng);
$("keys").addEventListener("click", toggleHelp);

const next = (list, value) => list[within(list.indexOf(value) + 1, list.length)];
const optionsOf = (id) => [...$(id).options].map((option) => option.value);
const KEYS = {
  h: () => set({ head: within(state.head + 1, heads()) }),
  H: () => set({ head: within(state.head - 1, heads()) }),
  l: () => set({ layer: within(state.layer + 1, layers(part()).length) }),
  L: () => set({ layer: within(state.layer - 1, layers(part()).length) }),
  p: () => set({ part: state.part + 1 }),
  P: () => set({ part: state.part - 1 }),
  v: () => set({ view: next(optionsOf("view"), state.view) }),
  c: () => set({ scale: next(optionsOf("scale"), state.scale) }),
  a: () => set({ a: within(state.a + 1, DATA.models.length) }),
  b: () => set({ b: within(state.b + 2, DATA.models.length + 1) - 1 }),
  m: () => state.b >= 0 && set({ difference: !state.difference }),
  t: swapTheme,
  s: saveSvg,
  g: savePng,
  "?": toggleHelp,
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  if (event.key in KEYS) KEYS[event.key]();
});

setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
if (DATA.models.length > 1) Object.assign(state, { b: 1 });
refresh();
