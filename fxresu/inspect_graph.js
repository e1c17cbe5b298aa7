"use strict";
// Draws the graph of the chosen module. Needs the state and the helpers of inspect_page.js, which comes before it.

// ---------------------------------------------------------------------------------------------------------------- graph

/** What is drawn of the chosen module: operations of its own and of opened parts, other parts as one box each. */
function collect() {
  const shown = [];
  phase().graphs.forEach((graph, g) => {
    for (const node of nodesOf(graph, state.stage)) {
      if (node.op !== "output" && inside(home(node), state.module)) shown.push({ g, node });
    }
  });
  const quiet = (node) => !state.views && !node.mark && QUIET.has(node.op);
  if (state.expanded === null) {
    state.expanded = shown.filter((x) => !quiet(x.node)).length <= EXPANDED_UP_TO ? "all" : new Set();
  }
  const hidden = new Map();
  const items = [];
  const owner = new Map();
  for (const { g, node } of shown) {
    const part = closedPart(home(node));
    if (quiet(node) && part === null) { hidden.set(`${g}:${node.name}`, node); continue; }
    const last = items[items.length - 1];
    if (part !== null && last && last.part === part && last.g === g) last.nodes.push(node);
    else items.push({ g, part, nodes: [node], key: part === null ? `${g}:${node.name}` : `${g}:${part}:${node.name}` });
    owner.set(`${g}:${node.name}`, items.length - 1);
  }
  return { items, owner, hidden };
}

/** The outermost part of the chosen module around `fqn` that is not opened; null if all are. */
function closedPart(fqn) {
  if (fqn === state.module || state.expanded === "all") return null;
  const steps = (state.module ? fqn.slice(state.module.length + 1) : fqn).split(".");
  let at = state.module;
  for (const step of steps) {
    at = at ? `${at}.${step}` : step;
    if (!state.expanded.has(at)) return at;
  }
  return null;
}

/** Nodes that an operand stands for: itself, or what a hidden view was made of. */
function origins(g, name, hidden, seen) {
  const view = hidden.get(`${g}:${name}`);
  if (!view) return [name];
  const found = [];
  for (const operand of view.operands) {
    if (!seen.has(operand)) { seen.add(operand); found.push(...origins(g, operand, hidden, seen)); }
  }
  return found;
}

function connect({ items, owner, hidden }, first, last) {
  const boxes = items.slice(first, last).map((item) => ({ ...item, ...measure(item) }));
  const edges = [];
  const known = new Set();
  boxes.forEach((box, to) => {
    const outside = new Set();
    for (const node of box.nodes) {
      for (const operand of node.operands) {
        for (const name of origins(box.g, operand, hidden, new Set())) {
          const from = owner.get(`${box.g}:${name}`);
          if (from === undefined || from < first) outside.add(name);
          else if (from - first !== to && !known.has(`${from - first}>${to}`)) {
            known.add(`${from - first}>${to}`);
            edges.push([from - first, to]);
          }
        }
      }
    }
    box.outside = [...outside];
  });
  return { boxes, edges };
}

function measure(item) {
  const graph = phase().graphs[item.g];
  let kept = 0;
  let discarded = 0;
  for (const node of item.nodes) {
    const own = keeping(graph, node);
    kept += own.kept;
    discarded += own.discarded;
  }
  const lines = item.part === null ? nodeLines(item.nodes[0]) : partLines(item);
  const note = discarded ? `${bytes(discarded)} not kept` : kept ? `keeps ${bytes(kept)}` : "";
  const width = Math.min(240, Math.max(84, ...lines.map((l, k) => l.length * (k ? 6.9 : 8) + 18), note.length * 6.6 + 18));
  return { lines, note, noteKind: discarded ? "" : "kept", width, height: 14 + lines.length * 15 + (note ? 18 : 0) };
}

function nodeLines(node) {
  if (node.mark === "cast") {
    const what = node.call.startsWith("%") ? "" : shortName(node.call.split(",")[0]);
    return [`cast to ${node.value.split("[")[0]}`, what, node.value].filter(Boolean);
  }
  return [node.op, shortName(node.weight), node.value].filter(Boolean);
}

/** A parameter's name from the chosen module's point of view. */
function shortName(fqn) {
  return fqn.startsWith(`${state.module}.`) ? fqn.slice(state.module.length + 1) : fqn;
}

function partLines(item) {
  const name = state.module ? item.part.slice(state.module.length + 1) : item.part;
  const rewritten = item.nodes.filter((n) => n.mark === "rewritten").length;
  const reads = item.nodes.filter((n) => n.mark === "reads").length;
  const casts = item.nodes.filter((n) => n.mark === "cast").length;
  const said = [plural(item.nodes.length, "op"), rewritten && `${rewritten} rewritten`, reads && `${reads} not`, casts && plural(casts, "cast")];
  return [`${name}  ${KNOWN.get(item.part) || ""}`, said.filter(Boolean).join(", ")];
}

/** Layers by longest path, order by neighbours' means, then positions (Sugiyama, Tagawa and Toda 1981). */
function layout({ boxes, edges }) {
  const points = boxes.map((box, i) => ({ box, i, layer: 0, above: [], below: [], width: box.width }));
  for (const [from, to] of edges) points[to].layer = Math.max(points[to].layer, points[from].layer + 1);
  const readers = new Map();
  for (const [from, to] of edges) (readers.get(from) || readers.set(from, []).get(from)).push(to);
  const fed = new Set(edges.map((e) => e[1]));
  for (let i = points.length - 1; i >= 0; i -= 1) {
    if (!fed.has(i) && readers.has(i)) points[i].layer = Math.min(...readers.get(i).map((to) => points[to].layer)) - 1;
  }
  const paths = [];
  const labels = new Map();
  for (const [from, to] of edges) {
    if (points[to].layer - points[from].layer > LONGEST_EDGE) {
      (labels.get(to) || labels.set(to, []).get(to)).push(boxes[from].lines[0]);
      continue;
    }
    const path = [points[from]];
    for (let layer = points[from].layer + 1; layer < points[to].layer; layer += 1) {
      points.push({ box: null, layer, above: [], below: [], width: 12 });
      path.push(points[points.length - 1]);
    }
    path.push(points[to]);
    for (let k = 1; k < path.length; k += 1) { path[k].above.push(path[k - 1]); path[k - 1].below.push(path[k]); }
    paths.push({ from, to, path });
  }
  boxes.forEach((box, i) => {
    const far = [...box.outside.map((name) => `from %${name}`), ...(labels.get(i) || []).map((op) => `from ${op} above`)];
    for (const text of far.slice(0, 3)) {
      const short = text.length > 30 ? `${text.slice(0, 29)}…` : text;
      const pill = { box: null, text: short, layer: points[i].layer - 1, above: [], below: [points[i]], width: short.length * 6.2 + 12 };
      points[i].above.push(pill);
      points.push(pill);
      paths.push({ from: -1, to: i, path: [pill, points[i]] });
    }
  });
  const low = Math.min(0, ...points.map((p) => p.layer));
  const layers = [];
  for (const p of points) { p.layer -= low; (layers[p.layer] || (layers[p.layer] = [])).push(p); }
  const rows = layers.filter(Boolean);
  arrange(rows);
  let y = 16;
  let right = 0;
  for (const row of rows) {
    const tall = Math.max(...row.map((p) => (p.box ? p.box.height : p.text ? 16 : 0)));
    for (const p of row) { p.y = y; p.height = p.box ? p.box.height : p.text ? 16 : tall; right = Math.max(right, p.x + p.width / 2); }
    y += tall + 26;
  }
  const left = Math.min(...points.map((p) => p.x - p.width / 2)) - 16;
  for (const p of points) p.x -= left;
  return { points, paths, width: right - left + 16, height: y };
}

function arrange(rows) {
  const mean = (list, otherwise) => (list.length ? list.reduce((sum, p) => sum + p.order, 0) / list.length : otherwise);
  rows.forEach((row) => row.forEach((p, k) => { p.order = k; }));
  for (let round = 0; round < 8; round += 1) {
    const down = round % 2 === 0;
    for (const row of down ? rows : [...rows].reverse()) {
      row.forEach((p) => { p.rank = mean(down ? p.above : p.below, p.order); });
      row.sort((a, b) => a.rank - b.rank);
      row.forEach((p, k) => { p.order = k; });
    }
  }
  const gap = 14;
  for (const row of rows) {
    let x = 0;
    for (const p of row) { p.x = x + p.width / 2; x += p.width + gap; }
    for (const p of row) p.x -= x / 2;
  }
  for (let round = 0; round < 12; round += 1) {
    const down = round % 2 === 0;
    for (const row of down ? rows : [...rows].reverse()) {
      const want = row.map((p) => {
        const list = down ? p.above : p.below;
        return list.length ? list.reduce((sum, q) => sum + q.x, 0) / list.length : p.x;
      });
      const fromLeft = [];
      const fromRight = [];
      const apart = (k) => (row[k].width + row[k + 1].width) / 2 + gap;
      for (let k = 0; k < row.length; k += 1) fromLeft[k] = k ? Math.max(want[k], fromLeft[k - 1] + apart(k - 1)) : want[k];
      for (let k = row.length - 1; k >= 0; k -= 1) fromRight[k] = k < row.length - 1 ? Math.min(want[k], fromRight[k + 1] - apart(k)) : want[k];
      row.forEach((p, k) => { p.x = (fromLeft[k] + fromRight[k]) / 2; });
    }
  }
}

function drawGraph() {
  const found = collect();
  const pages = Math.max(1, Math.ceil(found.items.length / AT_ONCE));
  state.page = Math.min(state.page, pages - 1);
  const first = state.page * AT_ONCE;
  drawPath(found.items.length, pages);
  if (!found.items.length) {
    put("canvas", h("p", { class: "quiet", style: "padding: 12px" }, "No operation of this module is in the captured graphs."));
    drawDiff();
    return;
  }
  const drawing = layout(connect(found, first, first + AT_ONCE));
  const fresh = newNames();
  const svg = s("svg", { width: drawing.width, height: drawing.height, viewBox: `0 0 ${drawing.width} ${drawing.height}`, role: "img", "aria-label": `graph of ${state.module || DATA.model}` });
  for (const { from, to, path } of drawing.paths) {
    let d = "";
    for (let k = 1; k < path.length; k += 1) {
      const [x1, y1] = [path[k - 1].x, path[k - 1].y + path[k - 1].height];
      const [x2, y2] = [path[k].x, path[k].y];
      const middle = (y1 + y2) / 2;
      d += `M${x1} ${y1}C${x1} ${middle} ${x2} ${middle} ${x2} ${y2}`;
      if (path[k].box === null && !path[k].text && k < path.length - 1) d += `M${x2} ${y2}L${x2} ${y2 + path[k].height}`;
    }
    svg.append(s("path", { d, "data-from": from, "data-to": to }));
  }
  for (const p of drawing.points) {
    if (p.text) svg.append(s("g", { class: "pill" }, s("text", { x: p.x, y: p.y + 12, "text-anchor": "middle" }, p.text)));
    else if (p.box) svg.append(drawBox(p, fresh));
  }
  put("canvas", svg);
  drawDiff();
}

function drawBox(p, fresh) {
  const { box } = p;
  const node = box.nodes[0];
  const part = box.part !== null;
  const bad = part && box.nodes.some((n) => n.mark === "reads");
  const kind = part ? `group ${bad ? "reads" : box.nodes.some((n) => n.mark === "rewritten") ? "rewritten" : ""}` : node.mark;
  const isNew = box.nodes.some((n) => fresh.has(`${box.g}:${n.name}`));
  const chosen = state.chosen === box.key;
  const [x, y] = [p.x - box.width / 2, p.y];
  const clip = (text, k) => { const most = Math.floor((box.width - 14) / (k ? 6.6 : 7.7)); return text.length > most ? `${text.slice(0, most - 1)}…` : text; };
  const act = () => {
    if (part) { state.expanded.add(box.part); drawGraph(); } else chooseNode(box);
  };
  const group = s(
    "g",
    { class: `box ${kind}${isNew ? " new" : ""}${chosen ? " chosen" : ""}`, tabindex: 0, "data-key": box.key, "data-box": p.i, onclick: act,
      onkeydown: (event) => { if (event.key === "Enter") act(); } },
    s("title", {}, part ? `${box.part}: click to open` : `%${node.name} = ${node.op}(${node.call})`),
    s("rect", { x, y, width: box.width, height: box.height, rx: part ? 2 : 7 }),
    part && s("rect", { x: x + 3, y: y + 3, width: box.width - 6, height: box.height - 6, rx: 1, style: "fill: none" }),
    box.lines.map((line, k) => s("text", { x: p.x, y: y + 19 + k * 15, "text-anchor": "middle", class: k ? "sub" : null, "font-weight": k ? null : 600 }, clip(line, k))),
  );
  if (box.note) {
    const wide = box.note.length * 6.4 + 12;
    group.append(s("g", { class: `note ${box.noteKind}` },
      s("rect", { x: p.x - wide / 2, y: y + box.height - 20, width: wide, height: 15, rx: 4 }),
      s("text", { x: p.x, y: y + box.height - 9, "text-anchor": "middle" }, box.note)));
  }
  return group;
}

function drawPath(number, pages) {
  const steps = state.module ? state.module.split(".") : [];
  const links = [h("button", { onclick: () => chooseModule("") }, DATA.model)];
  steps.forEach((step, i) => links.push(" › ", h("button", { onclick: () => chooseModule(steps.slice(0, i + 1).join(".")) }, step)));
  const opened = state.expanded instanceof Set && state.expanded.size > 0;
  const pager = pages > 1 && [
    `   boxes ${state.page * AT_ONCE + 1} to ${Math.min(number, (state.page + 1) * AT_ONCE)} of ${number}  `,
    h("button", { id: "earlier", onclick: () => { state.page = Math.max(0, state.page - 1); drawGraph(); } }, "earlier"), "  ",
    h("button", { id: "later", onclick: () => { state.page += 1; drawGraph(); } }, "later"),
  ];
  put("path", links, opened && ["   ", h("button", { onclick: () => { state.expanded = new Set(); drawGraph(); } }, "close all parts")], pager);
}
