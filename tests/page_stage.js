// A page without a browser: runs the scripts of an HTML file on a stand-in for the parts of the DOM that they use.
// usage: node page_stage.js PAGE PROBE [dark]. PROBE is a script whose last value is printed as JSON; any error ends it.
"use strict";
const fs = require("node:fs");
const vm = require("node:vm");

const WIDTH = 700;
const EMPTY = new Set(["meta", "link", "input", "br"]);

class Pen {
  constructor() { this.rects = []; this.drawn = []; this.ratio = 1; }
  setTransform(a) { this.ratio = a; }
  clearRect() { this.rects = []; this.drawn = []; }
  fillRect(x, y, w, h) {
    if (![x, y, w, h].every(Number.isFinite)) throw new Error(`fillRect(${[x, y, w, h]})`);
    this.rects.push([x, y, w, h, this.fillStyle]);
    this.drawn.push({ rect: [x, y, w, h], colour: this.fillStyle });
  }
  strokeRect(x, y, w, h) { this.drawn.push({ frame: [x, y, w, h], colour: this.strokeStyle }); }
  fillText(text, x, y) { this.drawn.push({ text, at: [x, y], align: this.textAlign, colour: this.fillStyle }); }
  setLineDash(dash) { this.dash = dash; }
  beginPath() { this.path = []; }
  moveTo(x, y) { this.lineTo(x, y); }
  lineTo(x, y) {
    if (!Number.isFinite(x) || !Number.isFinite(y)) throw new Error(`lineTo(${x}, ${y})`);
    this.path.push([x, y]);
  }
  stroke() { this.drawn.push({ line: this.path, colour: this.strokeStyle, wide: this.lineWidth, dash: this.dash }); }
  getImageData(x, y) {
    const inside = ([left, top, w, h]) => x >= left && x < left + w && y >= top && y < top + h;
    const hit = this.rects.filter(inside).at(-1);
    return { data: hit === undefined ? [0, 0, 0, 0] : [...hit[4].match(/\d+/g).map(Number), 255] };
  }
}

class Element {
  constructor(name) {
    Object.assign(this, { name, children: [], attributes: {}, listeners: {}, style: {}, parentNode: null, hidden: false });
    Object.assign(this, { offsetWidth: 100, offsetHeight: 40, className: "", value: "", disabled: false, text: "" });
  }
  get clientWidth() { return WIDTH; }
  get textContent() { return this.text + this.children.map((child) => child.textContent).join(""); }
  set textContent(text) { this.text = text; this.children = []; }
  get id() { return this.attributes.id; }
  append(...parts) {
    for (const part of parts) {
      const child = part instanceof Element ? part : Object.assign(new Element("#text"), { text: String(part) });
      child.parentNode = this;
      this.children.push(child);
    }
  }
  replaceChildren(...parts) { this.children = []; this.append(...parts); }
  setAttribute(name, value) { this.attributes[name] = value; }
  getAttribute(name) { return this.attributes[name] ?? null; }
  addEventListener(kind, listener) { (this.listeners[kind] ??= []).push(listener); }
  dispatchEvent(event) { for (const listener of this.listeners[event.type] ?? []) listener(event); return true; }
  getBoundingClientRect() { return { left: 0, top: 0, width: WIDTH, height: 100 }; }
  getContext() { return (this.pen ??= new Pen()); }
  all() { return [this, ...this.children.flatMap((child) => child.all())]; }
  querySelectorAll(selector) {
    const [last, ...outer] = selector.split(" ").reverse();
    const fits = (one, part) => (part[0] === "#" ? one.id === part.slice(1) : one.name === part);
    const within = (one, parts) => {
      if (parts.length === 0) return true;
      for (let up = one.parentNode; up !== null; up = up.parentNode) {
        if (fits(up, parts[0])) return within(up, parts.slice(1));
      }
      return false;
    };
    return this.all().filter((one) => fits(one, last) && within(one, outer));
  }
  querySelector(selector) { return this.querySelectorAll(selector)[0] ?? null; }
}

function parse(html) {
  const root = new Element("root");
  let at = root;
  for (const [, raw, text, close, name, rest, plain] of html.matchAll(
    /(<(?:script|style)[^>]*>)([\s\S]*?)<\/(?:script|style)>|<(\/?)([a-z][a-z0-9]*|!doctype)([^>]*)>|([^<]+)/g)) {
    if (raw !== undefined) {
      const made = new Element(raw.match(/[a-z]+/)[0]);
      Object.assign(made.attributes, attributes(raw));
      made.text = text;
      at.append(made);
    } else if (plain !== undefined) at.append(plain);
    else if (name === "!doctype") continue;
    else if (close) at = at.parentNode;
    else {
      const made = new Element(name);
      Object.assign(made.attributes, attributes(rest));
      made.value = made.attributes.value ?? "";
      made.checked = "checked" in made.attributes;
      made.hidden = "hidden" in made.attributes;
      at.append(made);
      if (!EMPTY.has(name)) at = made;
    }
  }
  return root;
}

function attributes(text) {
  return Object.fromEntries([...text.matchAll(/([a-z-]+)(?:="([^"]*)")?/g)].map(([, name, value]) => [name, value ?? ""]));
}

// Custom properties of :root; in a dark room those of the second block replace them.
function variables(style, dark) {
  const blocks = [...style.matchAll(/:root \{([^}]*)\}/g)].slice(0, dark ? 2 : 1);
  return Object.fromEntries(blocks.flatMap(([, block]) => [...block.matchAll(/--([a-z0-9-]+): ([^;]+);/g)].map(([, n, v]) => [n, v])));
}

const [, , pagePath, probePath, dark] = process.argv;
const root = parse(fs.readFileSync(pagePath, "utf8"));
const shades = variables(root.querySelector("style").textContent, dark === "dark");
const document = {
  documentElement: root.querySelector("html"),
  createElement: (name) => new Element(name),
  getElementById: (id) => root.querySelector(`#${id}`),
  getElementsByName: (name) => root.all().filter((one) => one.attributes.name === name),
  querySelector: (selector) => root.querySelector(selector),
  querySelectorAll: (selector) => root.querySelectorAll(selector),
};
const room = {
  document, atob, console,
  devicePixelRatio: 1, innerWidth: 1400, innerHeight: 900,
  addEventListener() {},
  matchMedia: () => ({ matches: dark === "dark", addEventListener() {} }),
  getComputedStyle: () => ({ getPropertyValue: (name) => shades[name.slice(2)] ?? "" }),
  Event: class { constructor(type, more = {}) { Object.assign(this, more, { type }); } },
};
room.PointerEvent = room.MouseEvent = room.Event;
room.window = room;
vm.createContext(room);
for (const script of root.querySelectorAll("script")) {
  if (script.attributes.type === undefined) vm.runInContext(script.text, room, { filename: "page.js" });
}
console.log(JSON.stringify(vm.runInContext(fs.readFileSync(probePath, "utf8"), room, { filename: "probe.js" })));
