"use strict";
// All that is shown is made here: text becomes text nodes, never markup.

// Marks that show nothing, or turn the direction of what follows: they are spelt out.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028-\u202e\ufff9-\ufffb]|\p{Default_Ignorable_Code_Point}/gu;

function visible(text) {
  return String(text).replace(
    HIDDEN, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) {
      node.setAttribute(name, value);
    }
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined) continue;
    node.append(child instanceof Node ? child : visible(child));
  }
  return node;
}

function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function percent(share, digits = 1) {
  return share === null || share === undefined ? "–" : `${(100 * share).toFixed(digits)}%`;
}

function probability(logProbability) {
  if (logProbability === null || logProbability === undefined) return "–";
  const p = Math.exp(logProbability);
  return p >= 0.0005 ? percent(p) : p.toExponential(0);
}

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 0.001 || size >= 1e6) return value.toExponential(1).replace(".0e", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

// Rows of texts, the first of each being what it is about.
function dataTable(columns, rows) {
  return el("table", { class: "values" },
    el("thead", {}, el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows.map(([name, ...cells]) => el("tr", {}, el("th", { scope: "row" }, name),
      cells.map((cell) => el("td", {}, cell))))));
}

// One of several, as a row of buttons; `choose(value)` is called with what was chosen.
function choice(label, options, chosen, choose) {
  const group = el("div", { class: "choice", role: "group", "aria-label": label });
  const show = (value) => {
    for (const button of group.children) {
      button.setAttribute("aria-pressed", String(button.dataset.value === String(value)));
    }
  };
  for (const [value, text] of options) {
    group.append(el("button", {
      type: "button", "data-value": value, onclick: () => { show(value); choose(value); },
    }, text));
  }
  show(chosen);
  return { group, show };
}
