"use strict";
// The viewer. Its data is a JSON element of the page, made by rows.py and page.py.
const D = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const COLORS = { matmul: "#5b8def", attention: "#9466e0", communication: "#e08a1e", wait: "#d5d9e0",
  memory: "#7fb77e", weights: "#3f9c8b", launch: "#b0b7c3", host: "#b0b7c3", compute: "#5b8def",
  interference: "#d9534f" };
const at = { stage: D.stages.length, rank: 0, run: 0, node: null, text: false };
const open = new Set();

// -- small helpers -------------------------------------------------------------------------------
function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, props);
  element.append(...children);
  return element;
}
function draw(tag, attributes = {}, text = null) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}
function bytes(value) {
  if (typeof value !== "number") return `${value} bytes`;
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (value >= size) return `${(value / size).toPrecision(3)} ${unit}`;
  return `${value} bytes`;
}
const short = (text, length) => text.length > length ? `${text.slice(0, length - 1)}…` : text;
const tip = make("div", { id: "tip" });
function hint(element, text) {
  element.addEventListener("mousemove", (event) => {
    tip.textContent = text();
    tip.style.display = "block";
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - 470)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - 90)}px`;
  });
  element.addEventListener("mouseleave", () => { tip.style.display = "none"; });
}

// -- programs: runs of templates, values named relative to them -----------------------------------
const isRank = () => at.stage === D.stages.length;
const program = () => isRank() ? D.ranks[at.rank] : D.stages[at.stage];
const text = (number) => D.texts[number];
const rowsOf = (run) => D.templates[run[1]];
function filled(code, run) {
  const block = text(run[0]);
  return code.replace(/<([rawv])([^>]*)>/g, (_, kind, rest) =>
    kind === "r" ? `%${run[2] + Number(rest)}` : kind === "a" ? `%${rest}`
      : kind === "w" ? `@${block}${rest}` : `@${rest}`);
}
function runOf(number, of = program()) {
  let low = 0, high = of.runs.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (of.runs[middle][2] <= number) low = middle; else high = middle - 1;
  }
  return low;
}
function node(number, of = program()) {
  const run = of.runs[runOf(number, of)], row = rowsOf(run)[number - run[2]];
  if (!row) return null;
  const [op, code, type, source, layer, why, message] = row;
  return { number, run, op: text(op), code: filled(text(code), run), raw: text(code),
    type: text(type), source: text(source), layer: text(run[0]) + text(layer), why: text(why),
    message: message < 0 ? null : D.messages[message] };
}
const reads = (one) => [...one.raw.matchAll(/<([ra])(-?\d+)>/g)].map(([, kind, value]) =>
  kind === "r" ? one.run[2] + Number(value) : Number(value));
function titleOf(run) {
  const block = text(run[0]);
  if (block) return block;
  const layers = [...new Set(rowsOf(run).map((row) => text(row[4])).filter(Boolean))];
  return short(layers.join(", ") || "the model itself", 60);
}

// -- ranks and messages ---------------------------------------------------------------------------
function coordinates(rank) {
  const found = {};
  for (const [axis, size] of [...D.mesh].reverse()) {
    found[axis] = rank % size;
    rank = Math.floor(rank / size);
  }
  return found;
}
function rankAt(place) {
  return D.mesh.reduce((rank, [axis, size]) => rank * size + place[axis], 0);
}
const peer = (rank, axis, place) => rankAt({ ...coordinates(rank), [axis]: place });
function group(rank, axis) {
  let found = [coordinates(rank)];
  for (const name of axis.split(",")) {
    const size = (D.mesh.find(([other]) => other === name) || [name, 1])[1];
    found = found.flatMap((place) => [...Array(size).keys()].map((i) => ({ ...place, [name]: i })));
  }
  return [...new Set(found.map(rankAt))];
}
function* messages(rank, runs = D.ranks[rank].runs) {
  for (const run of runs)
    for (const [offset, row] of rowsOf(run).entries())
      if (row[6] >= 0) yield [run[2] + offset, D.messages[row[6]]];
}
function matching(rank, number, message) {
  // The node at the other end of a transfer: the n-th between the same two ranks.
  const to = peer(rank, message.axis, message.to), mine = coordinates(rank)[message.axis];
  let nth = 0;
  for (const [other, sent] of messages(rank)) {
    if (other === number) break;
    if (sent.shift && sent.axis === message.axis && sent.to === message.to) nth += 1;
  }
  for (const [other, taken] of messages(to))
    if (taken.shift && taken.axis === message.axis && taken.source === mine && nth-- === 0)
      return [to, other];
  return [to, null];
}

// -- the tree of blocks -----------------------------------------------------------------------------
const tree = make("nav"), main = make("main"), side = make("aside"), time = make("footer");
function showTree() {
  const runs = program().runs, groups = [];
  runs.forEach((run, index) => {
    const last = groups[groups.length - 1];
    if (last && run[0] !== last.run[0] && text(run[0]) && last.run[1] === run[1])
      last.members.push(index);
    else groups.push({ run, members: [index] });
  });
  tree.replaceChildren(...groups.flatMap(({ run, members }) => {
    const sent = [...messages(at.rank, [run])].reduce(
      (sum, [, message]) => sum + (Number(message.bytes) || 0), 0);
    const ops = rowsOf(run).length;
    const about = `${ops} op${ops === 1 ? "" : "s"}${isRank() && sent ? `, sends ${bytes(sent)}` : ""}`;
    const many = members.length > 1;
    const last = many ? ` … ${titleOf(runs[members.at(-1)])}` : "";
    const head = make("button", { onclick: () => {
      if (many) open.has(run[2]) ? open.delete(run[2]) : open.add(run[2]);
      pickRun(members[0]);
    } }, (many ? (open.has(run[2]) ? "▾ " : "▸ ") : "") + titleOf(run) + last,
    make("small", {}, (many ? `${members.length} alike, each ` : "") + about));
    const inside = members.includes(at.run);
    head.className = inside && !(many && open.has(run[2])) ? "picked" : "";
    const inner = many && open.has(run[2]) ? members.map((index) => make("button", {
      className: `inner${index === at.run ? " picked" : ""}`, onclick: () => pickRun(index),
    }, titleOf(runs[index]))) : [];
    return [head, ...inner];
  }));
}

// -- a block as a graph: layers by longest path, order by the middle of neighbours --------------------
const WIDTH = 176, HEIGHT = 38, GAP_X = 26, GAP_Y = 30;
function layout(run) {
  const rows = rowsOf(run), start = run[2], boxes = new Map(), edges = [];
  rows.forEach((_, offset) => boxes.set(start + offset, { id: start + offset, level: 0 }));
  for (const box of [...boxes.values()]) {
    const one = node(box.id);
    for (const read of new Set(reads(one))) {
      if (!boxes.has(read)) boxes.set(read, { id: read, level: 0, outer: true });
      edges.push([read, box.id]);
      box.level = Math.max(box.level, boxes.get(read).level + 1);
    }
  }
  for (const box of boxes.values()) {  // what is outside stands right above its first reader
    if (!box.outer) continue;
    const below = edges.filter(([from]) => from === box.id).map(([, to]) => boxes.get(to).level);
    box.level = Math.max(0, Math.min(...below) - 1);
  }
  const levels = [];
  const put = (box) => (levels[box.level] = levels[box.level] || []).push(box);
  boxes.forEach(put);
  const chains = edges.map(([from, to]) => {
    const a = boxes.get(from), b = boxes.get(to), chain = [a];
    for (let level = a.level + 1; level < b.level; level += 1) {
      const dummy = { level, dummy: true, up: [], down: [] };
      put(dummy);
      chain.push(dummy);
    }
    chain.push(b);
    return chain;
  });
  const all = levels.flat();
  all.forEach((box) => { box.up = []; box.down = []; });
  for (const chain of chains)
    for (let i = 1; i < chain.length; i += 1) {
      chain[i].up.push(chain[i - 1]);
      chain[i - 1].down.push(chain[i]);
    }
  levels.forEach((level) => level.forEach((box, i) => { box.x = i; }));
  const middle = (list, self) => list.length
    ? list.reduce((sum, box) => sum + box.x, 0) / list.length : self.x;
  for (let sweep = 0; sweep < 12; sweep += 1) {
    const down = sweep % 2 === 0, order = down ? levels : [...levels].reverse();
    for (const level of order) {
      for (const box of level) box.wish = middle(down ? box.up : box.down, box);
      level.sort((a, b) => a.wish - b.wish);
      level.forEach((box, i) => { box.x = i; });
    }
  }
  const wide = (box) => box.dummy ? 10 : WIDTH;
  levels.forEach((level) => {
    let x = 0;
    for (const box of level) { box.x = x + wide(box) / 2; x += wide(box) + GAP_X; }
  });
  for (let sweep = 0; sweep < 24; sweep += 1) {
    const down = sweep % 2 === 0;
    for (const level of down ? levels : [...levels].reverse()) {
      for (const box of level) box.wish = middle(down ? box.up : box.down, box);
      let edge = -Infinity;
      for (const box of level) {
        box.left = Math.max(box.wish, edge + wide(box) / 2);
        edge = box.left + wide(box) / 2 + GAP_X;
      }
      edge = Infinity;
      for (const box of [...level].reverse()) {
        box.right = Math.min(box.wish, edge - wide(box) / 2);
        edge = box.right - wide(box) / 2 - GAP_X;
      }
      for (const box of level) box.x = (box.left + box.right) / 2;
    }
  }
  const least = Math.min(...all.map((box) => box.x - wide(box) / 2));
  for (const box of all) {
    box.x += 20 - least;
    box.y = 46 + box.level * (HEIGHT + GAP_Y);
  }
  const width = Math.max(...all.map((box) => box.x + wide(box) / 2)) + 20;
  return { boxes: [...boxes.values()], chains, width, height: 66 + levels.length * (HEIGHT + GAP_Y) };
}
function kindOf(one) {
  if (one.message || /(^|\.)(wait|shift_start)$/.test(one.op)) return "talk";
  if (/attention|attend|merge|finish/.test(one.op)) return "attention";
  return /^(linear|mm|bmm|matmul|addmm|einsum|expert_linear|conv)/.test(one.op) ? "matmul" : "";
}
function graph(run) {
  const { boxes, chains, width, height } = layout(run);
  const scale = Math.min(1, Math.max(0.72, (main.clientWidth - 24) / width));
  const svg = draw("svg", { width: width * scale, height: height * scale,
    viewBox: `0 0 ${width} ${height}` });
  for (const chain of chains) {
    const points = chain.map((box, i) => [box.x, box.y + (i ? 0 : HEIGHT)]);
    let path = `M${points[0]}`;
    for (let i = 1; i < points.length; i += 1) {
      const [x, y] = points[i], [px, py] = points[i - 1], middle = (py + y) / 2;
      path += ` C${px},${middle} ${x},${middle} ${x},${y}`;
      if (chain[i].dummy) { points[i][1] += HEIGHT; path += ` L${x},${y + HEIGHT}`; }
    }
    const ends = [chain[0].id, chain.at(-1).id];
    svg.append(draw("path", { class: `edge${ends.includes(at.node) ? " near" : ""}`, d: path }));
  }
  for (const box of boxes) {
    const one = node(box.id), kind = box.outer ? "outer" : kindOf(one);
    const item = draw("g", { class: `node ${kind}${box.id === at.node ? " picked" : ""}`,
      transform: `translate(${box.x - WIDTH / 2},${box.y})`, "data-node": box.id });
    item.append(draw("rect", { width: WIDTH, height: HEIGHT }),
      draw("text", { x: 8, y: 15 }, short(`%${box.id} ${one.op}`, 27)),
      draw("text", { x: 8, y: 30, class: "type" }, short(box.outer
        ? `from ${titleOf(one.run)}` : one.type, 31)));
    item.addEventListener("click", () => pick(box.id));
    hint(item, () => describe(one));
    svg.append(item);
  }
  return svg;
}
function describe(one) {
  const line = D.sources[one.source];
  return [`%${one.number}: ${one.type}`, one.code, one.why,
    one.source + (line ? `: ${line}` : ""), one.message ? talk(one.message) : ""]
    .filter(Boolean).join("\n");
}
function talk(message) {
  if (!message.shift) return `${message.op}: this rank sends ${bytes(message.bytes)}`;
  return message.to === null ? "takes only" : `sends ${bytes(message.bytes)}`;
}
function showMain() {
  const run = program().runs[at.run], rows = rowsOf(run);
  const listed = at.text || rows.length > 400;
  const choice = (name, on, value) => make("button", { className: on ? "picked" : "",
    onclick: () => { at.text = value; showMain(); } }, name);
  const bar = make("div", { className: "bar" }, make("b", {}, titleOf(run)),
    choice("graph", !listed, false), choice("text", listed, true),
    make("span", {}, `${program().label}, ${rows.length} ops`));
  if (!listed) {
    main.replaceChildren(bar, graph(run));
    const picked = main.querySelector(".node.picked");
    if (picked) picked.scrollIntoView({ block: "center", inline: "center" });
    else main.scrollLeft = (main.scrollWidth - main.clientWidth) / 2;
    return;
  }
  const lines = rows.map((_, offset) => {
    const one = node(run[2] + offset);
    const line = make("button", { className: one.number === at.node ? "picked mono" : "mono",
      onclick: () => pick(one.number) },
    `%${one.number}: ${one.type} = ${one.code}  // ${one.source}`);
    hint(line, () => describe(one));
    return line;
  });
  main.replaceChildren(bar, make("pre", {}, ...lines));
  const picked = main.querySelector(".picked.mono");
  if (picked) picked.scrollIntoView({ block: "center" });
}

// -- the side: a value, who reads it, what is sent, and between which ranks --------------------------
const link = (name, action) => make("button", { className: "link mono", onclick: action }, name);
function entry(list, name, ...value) {
  list.append(make("dt", {}, name), make("dd", {}, ...value));
}
function showSide() {
  side.replaceChildren();
  if (at.node !== null) showNode(node(at.node));
  if (isRank()) showRanks();
  const facts = make("dl");
  entry(facts, "model", D.model);
  entry(facts, "mesh", D.parallel);
  entry(facts, "order", D.order);
  entry(facts, "bytes at", `${D.tokens.toLocaleString("en")} tokens`);
  if (isRank()) entry(facts, "weights", bytes(D.weights[at.rank]));
  side.append(make("h2", {}, "Program"), facts);
  for (const note of D.notes) side.append(make("p", {}, `note: ${note}`));
}
function showNode(one) {
  const list = make("dl");
  side.append(make("h2", {}, `%${one.number}`), list);
  entry(list, "call", make("code", {}, one.code));
  entry(list, "type", make("code", {}, one.type));
  if (one.layer) entry(list, "layer", one.layer);
  if (one.why) entry(list, "why", one.why);
  if (one.source) {
    const same = link(one.source, () => search(`line:${one.source}`));
    entry(list, "line", same, make("code", {}, D.sources[one.source] || ""));
  }
  const before = [...new Set(reads(one))];
  if (before.length) entry(list, "reads", ...before.map((n) => link(`%${n}`, () => pick(n))));
  const behind = readers(one.number);
  if (behind.length) entry(list, "read by", ...behind.map((n) => link(`%${n}`, () => pick(n))));
  if (one.message && isRank()) showMessage(list, one);
}
function readers(number) {
  const found = [], runs = program().runs, first = runOf(number);
  for (let index = first; index < runs.length && found.length < 12; index += 1)
    rowsOf(runs[index]).forEach((_, offset) => {
      const one = node(runs[index][2] + offset);
      if (one.number > number && reads(one).includes(number)) found.push(one.number);
    });
  return found;
}
function showMessage(list, one) {
  const message = one.message;
  entry(list, "sends", talk(message));
  if (!message.shift) {
    entry(list, "with", `ranks ${group(at.rank, message.axis).join(", ")} (${message.axis})`);
    return;
  }
  if (message.to !== null) {
    const [to, other] = matching(at.rank, one.number, message);
    entry(list, "to", link(`rank ${to}${other === null ? "" : `: %${other}`}`, () => {
      at.rank = to;
      rank.value = to;
      other === null ? show() : pick(other);
    }));
  }
  if (message.source !== null)
    entry(list, "from", `rank ${peer(at.rank, message.axis, message.source)}`);
}
function edgesBetween() {
  // What all ranks send in the block that is open, or in the node that is picked.
  const name = program().runs[at.run][0], found = new Map();
  const add = (from, to, size) => {
    const key = `${from},${to}`;
    found.set(key, (found.get(key) || 0) + size);
  };
  const picked = at.node === null ? null : node(at.node).message;
  for (let from = 0; from < D.ranks.length; from += 1) {
    if (picked && from !== at.rank) continue;
    const runs = D.ranks[from].runs.filter((run) => run[0] === name);
    for (const [number, message] of messages(from, runs)) {
      if (picked && number !== at.node) continue;
      const size = Number(message.bytes) || 1;
      if (!message.shift) {
        for (const to of group(from, message.axis)) if (to !== from) add(from, to, size);
      } else if (message.to !== null) add(from, peer(from, message.axis, message.to), size);
    }
  }
  return found;
}
function showRanks() {
  const count = D.ranks.length, edges = edgesBetween();
  const big = 290, svg = draw("svg", { width: big, height: big }), round = D.mesh.length === 1;
  const columns = round ? 1 : D.mesh.at(-1)[1], rows = Math.ceil(count / columns);
  const place = (rank) => {
    if (!round) {
      return [(rank % columns + 0.5) * big / columns, (Math.floor(rank / columns) + 0.5) * big / rows];
    }
    const angle = 2 * Math.PI * rank / count - Math.PI / 2;
    return [big / 2 + Math.cos(angle) * 110, big / 2 + Math.sin(angle) * 110];
  };
  const most = Math.max(1, ...edges.values()), radius = count > 64 ? 4 : count > 20 ? 10 : 15;
  for (const [key, size] of edges) {
    const [from, to] = key.split(",").map(Number), [ax, ay] = place(from), [bx, by] = place(to);
    const [mx, my] = [(ax + bx) / 2 + (by - ay) * 0.16, (ay + by) / 2 - (bx - ax) * 0.16];
    const path = draw("path", { d: `M${ax},${ay} Q${mx},${my} ${bx},${by}`, fill: "none",
      stroke: "#e08a1e", "stroke-width": 1 + 4 * size / most, opacity: 0.65 });
    hint(path, () => `rank ${from} to rank ${to}: ${bytes(size)}`);
    svg.append(path);
  }
  for (let other = 0; other < count; other += 1) {
    const [x, y] = place(other), circle = draw("circle", { cx: x, cy: y, r: radius,
      fill: other === at.rank ? "#1f6feb" : "#fff", stroke: "#667085" });
    const label = draw("text", { x, y: y + 4, "text-anchor": "middle", "pointer-events": "none",
      style: `fill: ${other === at.rank ? "#fff" : "#1d2430"}` }, count > 64 ? "" : other);
    circle.style.cursor = "pointer";
    circle.addEventListener("click", () => { at.rank = other; rank.value = other; show(); });
    hint(circle, () => `rank ${other} (${Object.entries(coordinates(other))
      .map(([axis, i]) => `${axis}=${i}`).join(", ")})`);
    svg.append(circle, label);
  }
  const what = at.node !== null && node(at.node).message ? `%${at.node}` : titleOf(program().runs[at.run]);
  side.append(make("h2", {}, `Between ranks: ${what}`), edges.size ? svg
    : make("p", {}, "Nothing is sent here."), edges.size ? "" : svg);
}

// -- timelines: measured, if one was given, and simulated ---------------------------------------------
function showTime() {
  const T = D.timeline, milli = (t) => `${(t.seconds * 1e3).toPrecision(4)} ms`;
  time.replaceChildren(
    ...D.measured ? timeline(D.measured, `${D.measured.title}: ${milli(D.measured)}`) : [],
    ...T.missing ? [make("div", { className: "bar" }, `No simulated timeline: ${T.missing}`)]
      : timeline(T, `Simulated on ${T.cluster}: ${milli(T)}`));
}
const scales = new Map();
function timeline(T, title) {
  if (!scales.has(T)) scales.set(T, { from: 0, width: 0 });
  const scale = scales.get(T);
  const total = T.seconds * 1e6;
  scale.width = scale.width || total;
  const bar = make("div", { className: "bar" }, make("b", {}, title),
  ...T.kinds.map((kind) => {
    const dot = make("i");
    dot.style.background = COLORS[kind] || "#999";
    return make("span", {}, dot, kind);
  }), make("span", {}, "wheel: zoom, drag: move, click: open"));
  const lanes = [];
  const lane = new Map();
  for (const [owner, stream] of T.events) {
    const key = owner * 64 + stream;
    if (!lane.has(key)) { lane.set(key, 0); lanes.push(key); }
  }
  lanes.sort((a, b) => a - b).forEach((key, i) => lane.set(key, i));
  const high = Math.max(9, Math.min(22, Math.floor(200 / lanes.length))), label = 120;
  const canvas = make("canvas", { width: innerWidth - 16, height: lanes.length * (high + 2) + 4 });
  const pen = canvas.getContext("2d"), span = canvas.width - label;
  const paint = () => {
    pen.clearRect(0, 0, canvas.width, canvas.height);
    for (const [owner, stream, number, kind, start, length] of T.events) {
      const x = (start - scale.from) / scale.width * span, wide = length / scale.width * span;
      if (x + wide < 0 || x > span) continue;
      const y = lane.get(owner * 64 + stream) * (high + 2) + 2;
      pen.fillStyle = COLORS[T.kinds[kind]] || "#999";
      pen.fillRect(label + Math.max(0, x), y, Math.max(0.6, wide + Math.min(0, x) - 0.3), high);
      if (owner === at.rank && number === at.node && number >= 0) {
        pen.strokeStyle = "#111";
        pen.strokeRect(label + Math.max(0, x), y, Math.max(2, wide), high);
      }
    }
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, label, canvas.height);
    pen.font = `${Math.min(11, high)}px system-ui, sans-serif`;
    for (const key of lanes) {
      const owner = Math.floor(key / 64);
      pen.fillStyle = owner === at.rank && isRank() ? "#1f6feb" : "#1d2430";
      pen.fillText(`rank ${owner} ${T.streams[key % 64]}`, 12,
        lane.get(key) * (high + 2) + high / 2 + 5);
    }
  };
  const under = (event) => {
    const x = event.offsetX - label, key = lanes[Math.floor((event.offsetY - 2) / (high + 2))];
    const when = scale.from + x / span * scale.width, slack = scale.width / span;
    return x < 0 || key === undefined ? null : T.events.find(([owner, stream, , , start, length]) =>
      owner * 64 + stream === key && start - slack <= when && when <= start + length + slack);
  };
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const middle = scale.from + (event.offsetX - label) / span * scale.width;
    scale.width = Math.min(total, Math.max(total / 1e5, scale.width * (event.deltaY > 0 ? 1.25 : 0.8)));
    scale.from = middle - (event.offsetX - label) / span * scale.width;
    scale.from = Math.max(0, Math.min(total - scale.width, scale.from));
    paint();
  }, { passive: false });
  canvas.addEventListener("mousemove", (event) => {
    if (event.buttons) {
      scale.from = Math.max(0, Math.min(total - scale.width,
        scale.from - event.movementX / span * scale.width));
      paint();
      return;
    }
    const found = under(event);
    tip.style.display = found ? "block" : "none";
    if (!found) return;
    const one = found[2] >= 0 ? node(found[2], D.ranks[found[0]]) : null;
    tip.textContent = `rank ${found[0]}, ${T.kinds[found[3]]}: ${(found[5] / 1e3).toPrecision(3)} ms`
      + (one ? `\n%${one.number} ${one.op} ${one.layer}` : "");
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - 470)}px`;
    tip.style.top = `${event.clientY - 50}px`;
  });
  canvas.addEventListener("mouseleave", () => { tip.style.display = "none"; });
  canvas.addEventListener("click", (event) => {
    const found = under(event);
    if (!found || found[2] < 0) return;
    at.stage = D.stages.length;
    slider.value = at.stage;
    at.rank = found[0];
    rank.value = at.rank;
    pick(found[2]);
  });
  paint();
  return [bar, canvas];
}

// -- the head: rank, stage, search -------------------------------------------------------------------
const rank = make("select", { onchange: () => {
  at.rank = Number(rank.value);
  at.stage = D.stages.length;
  slider.value = at.stage;
  at.node = null;
  show();
} }, ...D.ranks.map((_, i) => make("option", { value: i }, `rank ${i}`)));
const slider = make("input", { type: "range", min: 0, max: D.stages.length, value: at.stage,
  oninput: () => {
    const block = program().runs[at.run][0];
    at.stage = Number(slider.value);
    at.node = null;
    at.run = Math.max(0, program().runs.findIndex((run) => run[0] === block));
    show();
  } });
const stage = make("b"), changed = make("span", { className: "changed" });
function showStage() {
  stage.textContent = isRank() ? `rank ${at.rank}` : program().label;
  const before = isRank() ? D.stages.at(-1) : D.stages[at.stage - 1], now = program().ops;
  const parts = before ? [...new Set([...Object.keys(now), ...Object.keys(before.ops)])]
    .map((op) => [op, (now[op] || 0) - (before.ops[op] || 0)]).filter(([, by]) => by)
    .sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]))
    .map(([op, by]) => `${by > 0 ? "+" : "−"}${Math.abs(by)} ${op}`) : [];
  changed.textContent = before ? parts.join(", ") || "the same ops, other types" : "";
  changed.title = changed.textContent;
}
const box = make("input", { type: "search", placeholder: "op, layer, file:line, %12",
  oninput: () => search(box.value, true) });
const found = make("div", { id: "found" });
function search(words, typed = false) {
  if (!typed) box.value = words;
  const wanted = words.trim().toLowerCase(), hits = [];
  const line = wanted.startsWith("line:") ? wanted.slice(5) : null;
  if (wanted) {
    for (const run of program().runs) {
      rowsOf(run).forEach((_, offset) => {
        if (hits.length >= 60) return;
        const one = node(run[2] + offset);
        const all = `%${one.number} ${one.code} ${one.type} ${one.layer} ${one.source}`.toLowerCase();
        if (line ? one.source.toLowerCase() === line : all.includes(wanted)) hits.push(one);
      });
    }
  }
  found.style.display = wanted ? "block" : "none";
  found.replaceChildren(...hits.map((one) => make("button", { className: "mono", onclick: () => {
    found.style.display = "none";
    pick(one.number);
  } }, `%${one.number} ${one.code}  ${one.layer}`)), hits.length ? "" : make("p", {}, " nothing found"));
}
document.addEventListener("click", (event) => {
  if (!found.contains(event.target) && event.target !== box && !event.target.closest(".link"))
    found.style.display = "none";
});

function pick(number) {
  at.node = number;
  at.run = runOf(number);
  show();
}
function pickRun(index) {
  at.run = index;
  at.node = null;
  show();
}
function show() {
  at.run = Math.min(at.run, program().runs.length - 1);
  tip.style.display = "none";
  showStage();
  showTree();
  showMain();
  showSide();
  showTime();
}
const stages = D.stages.length ? [make("label", {}, "stage ", slider, stage), changed] : [];
document.body.append(
  make("header", {}, make("h1", {}, `${D.model}  ·  ${D.parallel}`), make("label", {}, "rank ", rank),
    ...stages, box),
  tree, main, side, time, tip, found);
addEventListener("resize", showTime);
// `#rank=1&node=30` opens that value.
const asked = new URLSearchParams(location.hash.slice(1));
at.rank = Math.min(Number(asked.get("rank")) || 0, D.ranks.length - 1);
rank.value = at.rank;
at.run = Math.max(0, program().runs.findIndex((run) => text(run[0])));
if (asked.has("node") && node(Number(asked.get("node")))) pick(Number(asked.get("node")));
else show();
