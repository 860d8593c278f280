"use strict";
// Draws the graph that stands in the element #graph. Text goes into the page as text only.
const graph = JSON.parse(document.getElementById("graph").textContent);
const SVG = "http://www.w3.org/2000/svg";
const COLUMN = 90, LETTER = 7.5, ROW = 74, LEFT = 70, TOP = 40, STRONGEST = 150;
const pinned = new Set(), unfolded = new Set();
let hovered = null, withErrors = true;

const ladderOf = new Map();
graph.ladders.forEach((ladder, n) => ladder.nodes.forEach(i => ladderOf.set(i, n)));
const rowOf = new Map(graph.layers.map((layer, n) => [layer, n + 1]));
const rows = graph.layers.length + 2;
const edges = graph.edges.map((edge, n) => ({...edge, n}));
const strongest = new Set([...edges].sort((a, b) => matters(b) - matters(a)).slice(0, STRONGEST).map(edge => edge.n));

function matters(edge) {
  return edge.share * Math.abs(graph.nodes[edge.target].effect);
}

function svg(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function html(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

const shown = number => number === null || number === undefined ? "" : (number > 0 ? "+" : "") + number.toPrecision(3);
const token = position => graph.tokens[position];
const labelOf = position => `${position} ${token(position)}`;

// A folded ladder is drawn at its first node; the others are hidden.
function drawnAt(i) {
  const n = ladderOf.get(i);
  return n === undefined || unfolded.has(n) ? i : graph.ladders[n].nodes[0];
}

function isDrawn(i) {
  return drawnAt(i) === i && (withErrors || graph.nodes[i].kind !== "error");
}

function rowOfNode(node) {
  if (node.kind === "target") return rows - 1;
  return node.kind === "embedding" ? 0 : rowOf.get(node.layer);
}

function places() {
  const cells = new Map(), found = new Map();
  graph.nodes.forEach((node, i) => {
    if (!isDrawn(i)) return;
    const key = rowOfNode(node) + "/" + node.position;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(i);
  });
  const widest = new Array(graph.tokens.length).fill(0);
  for (const [key, inside] of cells) {
    const position = Number(key.split("/")[1]);
    widest[position] = Math.max(widest[position], Math.min(inside.length, 10));
  }
  const starts = [LEFT];
  // A column without nodes is as wide as its token, so that the answer is not far from what leads to it.
  widest.forEach((n, position) => starts.push(
    starts[position] + Math.max(n ? COLUMN : 0, LETTER * labelOf(position).length + 24, 26 * n + 20)));
  for (const [key, inside] of cells) {
    const [row, position] = key.split("/").map(Number);
    inside.forEach((i, n) => found.set(i, {
      x: starts[position] + 20 + 26 * (n % 10),
      y: TOP + (rows - 1 - row) * ROW - 14 * Math.floor(n / 10),
    }));
  }
  return {found, starts, width: starts[starts.length - 1] + 20, height: TOP + rows * ROW};
}

function sign(node) {
  return node.kind === "error" || node.kind === "embedding" ? "other" : node.effect >= 0 ? "up" : "down";
}

const largest = Math.max(...graph.nodes.filter(node => node.kind === "feature").map(node => Math.abs(node.effect)), 1e-9);

function shape(node) {
  if (node.kind === "target") return svg("rect", {x: -11, y: -11, width: 22, height: 22, rx: 4});
  if (node.kind === "embedding") return svg("rect", {x: -7, y: -7, width: 14, height: 14, rx: 2});
  if (node.kind === "error") return svg("path", {d: "M0,-7L7,0L0,7L-7,0Z"});
  return svg("circle", {r: (4 + 7 * Math.sqrt(Math.abs(node.effect) / largest)).toFixed(1)});
}

function draw() {
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.node : null;
  const {found, starts, width, height} = places();
  const picture = svg("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "graph"});
  graph.tokens.forEach((_, position) => picture.append(
    svg("text", {x: starts[position] + 12, y: height - 8, class: "word"}, labelOf(position))));
  const active = new Set([...pinned, ...(hovered === null ? [] : [hovered])]);
  for (const edge of edges) {
    const source = drawnAt(edge.source), target = drawnAt(edge.target);
    const from = found.get(source), to = found.get(target);
    const near = active.has(source) || active.has(target);
    if (!from || !to || source === target || (!near && !strongest.has(edge.n))) continue;
    const kind = near ? (edge.weight >= 0 ? "up" : "down") : "faint";
    const bend = (from.y + to.y) / 2;
    picture.append(svg("path", {
      class: `edge ${kind}`, "stroke-width": (0.6 + 5 * edge.share).toFixed(1),
      d: `M${from.x},${from.y}C${from.x},${bend} ${to.x},${bend} ${to.x},${to.y}`,
    }));
  }
  graph.ladders.forEach((ladder, n) => {
    const at = found.get(ladder.nodes[0]);
    if (ladder.nodes.length < 2 || unfolded.has(n) || !at) return;
    const up = (ladder.nodes.length - 1) * ROW * 0.85;
    picture.append(svg("line", {
      class: `span ${sign(graph.nodes[ladder.nodes[0]])}`, x1: at.x, x2: at.x, y1: at.y, y2: at.y - up,
    }));
  });
  for (const [i, at] of found) {
    const node = graph.nodes[i];
    const state = (pinned.has(i) ? " pinned" : "") + (hovered === i ? " here" : "");
    const drawn = svg("g", {
      class: `node ${sign(node)}${state}`, transform: `translate(${at.x},${at.y})`, tabindex: 0, role: "button",
      "data-node": i, "aria-label": title(i),
    }, shape(node));
    picture.append(drawn);
  }
  const names = svg("g", {class: "names"}, svg("rect", {width: LEFT - 8, height}));
  for (let row = 0; row < rows; row++) {
    const name = row === 0 ? "tokens" : row === rows - 1 ? "answer" : `layer ${graph.layers[row - 1]}`;
    names.append(svg("text", {x: 6, y: TOP + (rows - 1 - row) * ROW + 4}, name));
  }
  picture.append(names);
  document.getElementById("picture").replaceChildren(picture);
  keepNames();
  if (focused !== null && focused !== undefined) {
    const again = picture.querySelector(`[data-node="${focused}"]`);
    if (again) again.focus({preventScroll: true});
  }
}

// Names of rows stay in sight where a long prompt is scrolled.
function keepNames() {
  const home = document.getElementById("picture");
  const names = home.querySelector(".names");
  if (names) names.setAttribute("transform", `translate(${home.scrollLeft},0)`);
}

function title(i) {
  const node = graph.nodes[i], ladder = graph.ladders[ladderOf.get(i)];
  if (node.kind === "target") return graph.quantity;
  if (node.kind === "embedding") return `token ${node.position} "${token(node.position)}"`;
  if (node.kind === "error") return `error of layer ${node.layer} at ${node.position} "${token(node.position)}"`;
  const last = ladder.nodes.length > 1 ? ` to layer ${graph.nodes[ladder.nodes[ladder.nodes.length - 1]].layer}` : "";
  return `${node.layer}/${node.feature}${last} at ${node.position} "${token(node.position)}"`;
}

// A feature's number with its label, or, where it has none, with the tokens that it promotes.
const named = i => {
  const {label, promotes} = graph.nodes[i];
  const words = promotes.slice(0, 3).map(word => word.trim() || JSON.stringify(word)).join(" · ");
  return [title(i), label || (words && `→ ${words}`)].filter(Boolean).join(" ");
};

// Where layers between were not taken apart, any of their blocks may have written it.
function writtenBy(ladder) {
  if (ladder.written === null) return "the token";
  const first = Math.max(-1, ...graph.layers.filter(layer => layer < ladder.written)) + 1;
  return first === ladder.written ? `block ${first}` : `blocks ${first} to ${ladder.written}`;
}

function tableOf(columns, lines) {
  const made = html("table", "", html("tr", "", ...columns.map(name => html("th", "", name))));
  for (const line of lines) {
    made.append(html("tr", "", ...line.map((cell, n) => html("td", n ? "n" : "", cell))));
  }
  return made;
}

function edgesOf(i, inward) {
  const ladder = ladderOf.get(i);
  const mine = new Set(ladder === undefined || unfolded.has(ladder) ? [i] : graph.ladders[ladder].nodes);
  return edges
    .filter(edge => mine.has(inward ? edge.target : edge.source) && !mine.has(inward ? edge.source : edge.target))
    .sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, 25)
    .map(edge => [named(inward ? edge.source : edge.target), shown(edge.weight), shown(edge.passed),
                  shown(edge.weight - edge.passed), `${(100 * edge.share).toFixed(0)}%`]);
}

function details(i) {
  const panel = document.getElementById("details");
  if (i === null) return;
  const node = graph.nodes[i], ladder = graph.ladders[ladderOf.get(i)];
  const parts = [html("h2", "", title(i))];
  if (node.label) parts.push(html("p", "", node.label));
  const facts = [["effect", shown(node.effect)]];
  if (node.exact !== null) facts.push(["by ablation", shown(node.exact)]);
  if (node.share !== null) facts.push(["growing with all others", shown(node.share)]);
  if (node.activation !== null) facts.push(["activation", shown(node.activation)]);
  if (ladder) facts.push(["written by", writtenBy(ladder)]);
  if (node.promotes.length) facts.push(["promotes", node.promotes.map(word => JSON.stringify(word)).join(" ")]);
  parts.push(tableOf(["", ""], facts));
  if (node.fires.length) {
    const top = Math.max(...node.fires.map(pair => pair[1]));
    const fires = new Map(node.fires), line = html("p", "");
    graph.tokens.forEach((word, position) => {
      const piece = html("span", "tok", word);
      const value = fires.get(position);
      if (value) {
        piece.style.background = `color-mix(in srgb, var(--pin) ${Math.round(70 * value / top)}%, transparent)`;
        piece.title = value.toPrecision(3);
      }
      line.append(piece);
    });
    parts.push(html("h2", "", "Where it fires"), line);
  }
  const columns = ["node", "weight", "passed on", "computed", "share"];
  for (const [name, inward] of [["Takes in", true], ["Sends", false]]) {
    const lines = edgesOf(i, inward);
    if (lines.length) parts.push(html("h2", "", name), tableOf(columns, lines));
  }
  if (ladder && ladder.nodes.length > 1) {
    const n = ladderOf.get(i), button = html("button", "", unfolded.has(n) ? "fold" : "unfold");
    button.addEventListener("click", () => { fold(n); details(drawnAt(i)); });
    parts.push(html("p", "", button));
  }
  panel.replaceChildren(...parts);
}

function fold(n) {
  if (!unfolded.delete(n)) unfolded.add(n);
  draw();
}

function nodeAt(event) {
  const drawn = event.target.closest ? event.target.closest("[data-node]") : null;
  return drawn ? Number(drawn.dataset.node) : null;
}

const picture = document.getElementById("picture");
picture.addEventListener("scroll", keepNames);
picture.addEventListener("mouseover", event => {
  const i = nodeAt(event);
  if (i === null || i === hovered) return;
  hovered = i;
  details(i);
  draw();
});
function pin(i) {
  if (!pinned.delete(i)) pinned.add(i);
  details(i);
  draw();
  tell();
}

// Within another page: it hears which nodes are pinned, of a folded ladder the strongest, and says light or dark.
function tell() {
  if (window.parent === window) return;
  const size = i => Math.abs(graph.nodes[i].effect);
  const strongestOf = i => {
    const n = ladderOf.get(i);
    return n === undefined || unfolded.has(n) ? i : graph.ladders[n].nodes.reduce((a, b) => size(b) > size(a) ? b : a);
  };
  window.parent.postMessage({pinned: [...pinned].map(strongestOf)}, "*");
}
window.addEventListener("message", event => {
  const scheme = event.source === window.parent && event.data ? event.data.scheme : null;
  if (scheme === "light" || scheme === "dark") document.documentElement.style.colorScheme = scheme;
});
picture.addEventListener("click", event => { const i = nodeAt(event); if (i !== null) pin(i); });
picture.addEventListener("dblclick", event => {
  const n = ladderOf.get(nodeAt(event));
  if (n !== undefined) fold(n);
});
picture.addEventListener("focusin", event => { const i = nodeAt(event); if (i !== null) details(i); });
picture.addEventListener("keydown", event => {
  const i = nodeAt(event);
  if (i !== null && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); pin(i); }
});
document.getElementById("errors").addEventListener("change", event => { withErrors = event.target.checked; draw(); });
document.getElementById("unfold").addEventListener("change", event => {
  graph.ladders.forEach((ladder, n) => event.target.checked ? unfolded.add(n) : unfolded.delete(n));
  draw();
});
document.getElementById("unpin").addEventListener("click", () => { pinned.clear(); draw(); tell(); });
draw();
details(graph.nodes.length - 1);
// The answer stands at the right end, which stays in sight as the page takes its size, until somebody scrolls.
let scrolled = false;
for (const by of ["wheel", "pointerdown", "keydown", "touchmove"]) {
  picture.addEventListener(by, () => { scrolled = true; }, {passive: true});
}
new ResizeObserver(() => { if (!scrolled) picture.scrollLeft = picture.scrollWidth; }).observe(picture);
tell();
