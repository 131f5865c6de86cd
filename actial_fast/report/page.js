"use strict";
// Charts that answer: values under the pointer, a part of the steps from close by, another smoothing, a log axis, lines left out. Every
// <figure> has its values beside its picture (chart.py, bars.py). What stands there at first is Python's picture, and it comes back with
// "reset"; without this script it stays.

const SMOOTHINGS = [["as recorded", 0], ["smoothed", 30], ["smoother", 10], ["smoothest", 4]];  // a mean is over a stage's points / this
const FEWEST = 15, LEAST = 5;  // points that are not averaged (chart.SMOOTHED), and that a mean is over at least
const SOFTENED = 1;            // of SMOOTHINGS: what Python draws
const CLOSEST = 4;             // steps that a zoomed picture has at least
const LOOSE = 12;              // picture units that a drag has to go before it is one

const general = (value, digits) => String(+value.toPrecision(digits));

function number(value, digits = 3) {
  if (value === null || !isFinite(value)) return "-";
  const size = Math.abs(value);
  if (size >= 999500) return general(value / 1e6, digits) + "M";
  if (size >= 9995) return general(value / 1e3, digits) + "k";
  if (size >= 999.5) return value.toFixed(Math.max(0, digits - 4));
  return size && size < 1e-3 ? String(+value.toPrecision(digits)).replace("e-", "e-0").replace(/e-0(\d\d)/, "e-$1") : general(value, digits);
}

function ticks(low, high, most) {
  if (!(high > low)) return [low];
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const gap = [1, 2, 2.5, 5, 10].map(m => m * power).find(g => g >= rough * (1 - 1e-9)), found = [];
  for (let i = Math.ceil(low / gap - 1e-9); i <= high / gap + 1e-9; i++) found.push(+(i * gap).toPrecision(12));
  return found;
}

function logTicks(low, high) {
  const decades = [], inside = value => value >= low && value <= high;
  for (let d = Math.floor(Math.log10(low)); d <= Math.ceil(Math.log10(high)); d++) decades.push(10 ** d);
  const tens = decades.filter(inside);
  if (tens.length >= 3) return tens.filter((_, i) => i % Math.ceil(tens.length / 6) === 0);
  const found = decades.flatMap(ten => [ten, 2 * ten, 5 * ten]).filter(inside);
  return found.length > 1 ? found : ticks(low, high, 5);
}

function averaged(values, parts) {
  const n = values.length;
  if (!parts || n < FEWEST) return values;
  const half = Math.floor(Math.max(LEAST, Math.floor(n / parts)) / 2), total = [0], count = [0];
  values.forEach((value, i) => {
    total.push(total[i] + (value ?? 0));
    count.push(count[i] + (value !== null));
  });
  return values.map((value, i) => {
    const a = Math.max(0, i - half), b = Math.min(n, i + half + 1);
    return value === null ? null : (total[b] - total[a]) / (count[b] - count[a]);
  });
}

function nearest(sorted, wanted) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle; else high = middle;
  }
  return wanted - sorted[low] <= sorted[high] - wanted ? low : high;
}

function element(name, attributes = {}, text = "") {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

const escaped = text => element("i", {}, text).innerHTML;

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.svg = figure.querySelector("svg");
    this.data = JSON.parse(figure.querySelector("script").textContent);
    [this.left, this.right, this.top, this.bottom] = this.data.margins;
    ({width: this.width, height: this.height} = this.svg.viewBox.baseVal);
    this.first = this.svg.innerHTML;
    this.whole = [this.left, this.width - this.right];
    this.view = this.whole;
    this.log = Boolean(this.data.log);
    this.smoothing = SOFTENED;
    this.hidden = new Set();
    this.read();
    this.equip();
  }

  read() {
    this.lines = this.data.lines.map(line => {
      const stages = {};
      for (const [stage, [steps, values]] of Object.entries(line.stages)) {
        stages[stage] = {values, steps: Array.isArray(steps) ? steps : values.map((_, i) => steps + i)};
      }
      return {...line, colour: `var(--c${line.colour})`, stages};
    });
    const all = this.lines.flatMap(line => Object.values(line.stages).flatMap(points => points.values));
    this.positive = !this.data.percent && all.some(value => value > 0);
    this.rough = this.lines.some(line => !line.dots && Object.values(line.stages).some(points => points.values.length >= FEWEST));
  }

  get zoomed() { return this.view !== this.whole; }
  get untouched() { return !this.zoomed && this.log === Boolean(this.data.log) && this.smoothing === SOFTENED && !this.hidden.size; }

  // --- what a reader does ---------------------------------------------------------------------------------------------------------------

  equip() {
    const tools = element("span", {class: "tools"});
    if (this.rough) {
      const select = tools.appendChild(element("select", {"aria-label": "smoothing"}));
      SMOOTHINGS.forEach(([name], i) => select.append(new Option(name, i, i === SOFTENED, i === SOFTENED)));
      select.onchange = () => { this.smoothing = +select.value; this.draw(); };
      this.select = select;
    }
    if (this.positive) {
      this.logButton = tools.appendChild(element("button", {type: "button", "aria-pressed": this.log}, "log"));
      this.logButton.onclick = () => { this.log = !this.log; this.draw(); };
    }
    const closer = tools.appendChild(element("button", {type: "button", "aria-label": "closer", title: "closer; or drag over the steps"}, "+"));
    closer.onclick = () => this.closer();
    this.resetButton = tools.appendChild(element("button", {type: "button", hidden: ""}, "reset"));
    this.resetButton.onclick = () => this.reset();
    this.figure.querySelector("figcaption").append(tools);
    this.tip = this.figure.appendChild(element("div", {class: "told", hidden: ""}));

    this.figure.querySelectorAll("[data-line]").forEach((entry, i) => {
      entry.setAttribute("role", "button");
      entry.setAttribute("tabindex", "0");
      entry.setAttribute("aria-pressed", "true");
      const turn = () => {
        if (this.hidden.has(i)) this.hidden.delete(i); else this.hidden.add(i);
        entry.setAttribute("aria-pressed", !this.hidden.has(i));
        this.draw();
      };
      entry.onclick = turn;
      entry.onkeydown = event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); turn(); } };
    });

    this.svg.setAttribute("tabindex", "0");
    this.svg.onpointermove = event => this.pointed(event);
    this.svg.onpointerdown = event => {
      if (event.pointerType === "mouse" && event.button === 0) this.began = this.place(event);
      this.pointed(event);
    };
    this.svg.onpointerleave = () => { this.began = undefined; this.unmark(); };
    this.svg.onpointerup = event => {
      const began = this.began, ended = this.place(event);
      this.began = undefined;
      if (began !== undefined && Math.abs(ended - began) > LOOSE) this.zoom(began, ended);
    };
    this.svg.ondblclick = () => this.reset();
    this.svg.onblur = () => this.unmark();
    this.svg.onkeydown = event => {
      const act = {ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1), "+": () => this.closer(), Escape: () => this.reset()}[event.key];
      if (act) { event.preventDefault(); act(); }
    };
  }

  place(event) {
    const box = this.svg.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - box.left) * this.width / box.width, this.left), this.width - this.right);
  }

  pointed(event) {
    const x = this.place(event);
    if (this.began === undefined || Math.abs(x - this.began) <= LOOSE) return this.mark(this.back(x));
    const [a, b] = [Math.min(x, this.began), Math.max(x, this.began)];
    this.unmark();
    this.over(`<rect class="chosen" x="${a}" y="${this.top}" width="${b - a}" height="${this.height - this.top - this.bottom}"/>`);
  }

  zoom(a, b) {  // places in the picture as it stands
    const ends = [this.back(Math.min(a, b)), this.back(Math.max(a, b))], middle = (ends[0] + ends[1]) / 2;
    const [, x0, x1, last] = this.spanAt(middle), least = CLOSEST * (x1 - x0) / Math.max(CLOSEST, last) / 2;
    this.view = [Math.max(Math.min(ends[0], middle - least), this.whole[0]), Math.min(Math.max(ends[1], middle + least), this.whole[1])];
    this.draw();
  }

  closer() {
    const middle = this.forth(this.at ?? (this.view[0] + this.view[1]) / 2), half = (this.whole[1] - this.whole[0]) / 4;
    this.zoom(Math.max(middle - half, this.whole[0]), Math.min(middle + half, this.whole[1]));
  }

  reset() {
    this.view = this.whole;
    this.log = Boolean(this.data.log);
    this.smoothing = SOFTENED;
    this.hidden.clear();
    if (this.select) this.select.value = SOFTENED;
    this.figure.querySelectorAll("[data-line]").forEach(entry => entry.setAttribute("aria-pressed", "true"));
    this.draw();
  }

  step(by) {
    const line = this.lines.find((_, i) => !this.hidden.has(i));
    if (!line) return;
    const all = this.data.spans.flatMap(([stage, x0, x1, last]) => (line.stages[stage]?.steps ?? []).map(s => x0 + (x1 - x0) * s / Math.max(1, last)));
    const inside = all.filter(u => u >= this.view[0] - 0.01 && u <= this.view[1] + 0.01);
    const now = this.at === undefined ? (by > 0 ? -1 : inside.length) : nearest(inside, this.at);
    if (inside.length) this.mark(inside[Math.min(Math.max(now + by, 0), inside.length - 1)]);
  }

  // --- the picture ----------------------------------------------------------------------------------------------------------------------

  forth(u) { return this.left + (u - this.view[0]) / (this.view[1] - this.view[0]) * (this.width - this.left - this.right); }
  back(x) { return this.view[0] + (x - this.left) / (this.width - this.left - this.right) * (this.view[1] - this.view[0]); }
  spanAt(u) { return this.data.spans.find(([, x0, x1]) => u >= x0 - 0.01 && u <= x1) ?? this.data.spans.at(-1); }
  placeOf(stage, step) { const [, x0, x1, last] = this.data.spans.find(span => span[0] === stage); return x0 + (x1 - x0) * step / Math.max(1, last); }

  draw() {
    this.unmark();
    this.logButton?.setAttribute("aria-pressed", this.log);
    this.resetButton.hidden = this.untouched;
    this.svg.innerHTML = this.untouched ? this.first : this.shapes();
  }

  shapes() {
    const ceiling = this.zoomed || this.log ? Infinity : this.data.top ?? Infinity, drawn = [];
    let low = Infinity, high = -Infinity;
    this.lines.forEach((line, i) => {
      for (const [stage, points] of this.hidden.has(i) ? [] : Object.entries(line.stages)) {
        const soft = line.dots ? points.values : averaged(points.values, SMOOTHINGS[this.smoothing][1]);
        const places = points.steps.map(step => this.placeOf(stage, step)), inside = [];
        places.forEach((u, k) => { if (u >= this.view[0] - 0.01 && u <= this.view[1] + 0.01) inside.push(k); });
        for (const k of inside) {
          const value = points.values[k];
          if (value === null || (this.log && value <= 0)) continue;
          low = Math.min(low, value);
          high = Math.max(high, Math.min(value, ceiling));
        }
        drawn.push({line, points, soft, places, inside});
      }
    });
    if (low > high) return this.frame([]) + `<text class="tick" x="${this.left + 8}" y="${this.top + 20}">nothing to draw here</text>`;
    for (const [, value] of this.zoomed || this.log ? [] : this.data.guides) [low, high] = [Math.min(low, value), Math.max(high, value)];
    [low, high] = this.data.percent && !this.zoomed ? [0, 1] : this.range(low, high);
    const y = this.y(low, high);
    let out = this.frame(this.log ? logTicks(low, high) : ticks(low, high, 5), y);
    for (const [, value, colour] of this.data.guides) {
      if (value < low || value > high) continue;
      const style = colour === null ? "" : ` style="stroke:var(--c${colour})"`;
      out += `<line class="guide"${style} x1="${this.left}" x2="${this.width - this.right}" y1="${y(value)}" y2="${y(value)}"/>`;
    }
    for (const {line, points, soft, places, inside} of drawn) {
      const stroke = `stroke:${line.colour}${line.dash ? ";stroke-dasharray:" + line.dash : ""}`;
      const path = values => inside.reduce(([d, pen], k) => {
        const value = values[k];
        if (value === null || value > ceiling || (this.log && value <= 0)) return [d, "M"];
        return [`${d}${pen}${this.forth(places[k]).toFixed(1)},${y(value).toFixed(1)}`, "L"];
      }, ["", "M"])[0];
      if (soft !== points.values) out += `<path class="raw" style="${stroke}" d="${path(points.values)}"/>`;
      out += `<path class="line" style="${stroke}" d="${path(soft)}"/>`;
      if (!line.dots && inside.length > 1) continue;
      for (const k of inside.filter(k => points.values[k] !== null && (!this.log || points.values[k] > 0))) {
        out += `<circle r="2.6" style="fill:${line.colour}" cx="${this.forth(places[k]).toFixed(1)}" cy="${y(points.values[k]).toFixed(1)}"/>`;
      }
    }
    return out;
  }

  range(low, high) {
    if (this.log) return [low / 1.15, high * 1.15];
    if (high - low <= 1e-6 * Math.max(Math.abs(low), Math.abs(high))) return [Math.min(0, 2 * low), Math.max(0, 2 * high) || +!low];
    if (low >= 0 && low < 0.5 * high && !this.zoomed) low = 0;
    const room = 0.05 * (high - low);
    return [low ? low - room : 0, high + room];
  }

  y(low, high) {
    const floor = this.height - this.bottom, span = floor - this.top, of = this.log ? Math.log10 : value => value;
    return value => floor - span * (of(value) - of(low)) / (of(high) - of(low));
  }

  label(value, digits) { return this.data.percent ? general(100 * value, Math.max(digits, 3)) + "%" : number(value, digits); }

  frame(rules, y) {
    const digits = [3, 4, 5, 6, 7, 8].find(d => new Set(rules.map(value => this.label(value, d))).size === rules.length) ?? 9;
    const floor = this.height - this.bottom, right = this.width - this.right;
    let out = "";
    for (const value of rules) {
      out += `<line class="grid" x1="${this.left}" x2="${right}" y1="${y(value)}" y2="${y(value)}"/>`
        + `<text class="tick" text-anchor="end" x="${this.left - 6}" y="${y(value) + 3.5}">${this.label(value, digits)}</text>`;
    }
    this.data.spans.forEach(([stage, x0, x1, last], i) => {
      const a = Math.max(x0, this.view[0]), b = Math.min(x1, this.view[1]);
      if (b <= a) return;
      const step = u => (u - x0) / (x1 - x0) * last, from = this.forth(a), to = this.forth(b);
      for (const tick of ticks(step(a), step(b), Math.max(1, Math.floor((to - from) / 70)))) {
        if (tick === Math.round(tick)) {
          const x = this.forth(this.placeOf(stage, tick));
          const anchor = x > right - 16 ? "end" : i && x < from + 16 ? "start" : "middle";
          out += `<text class="tick" text-anchor="${anchor}" x="${x}" y="${this.height - 8}">${tick.toLocaleString("en")}</text>`;
        }
      }
      if (i && x0 > this.view[0]) out += `<line class="rule" x1="${from}" x2="${from}" y1="${this.top - 12}" y2="${floor}"/>`;
      out += `<text class="stage" x="${from + 4}" y="${this.top - 5}">${escaped(stage)}</text>`;
    });
    this.scale = y;
    return out;
  }

  // --- values under the pointer ---------------------------------------------------------------------------------------------------------

  unmark() {
    this.at = undefined;
    this.tip.hidden = true;
    this.svg.querySelector(".over")?.remove();
  }

  over(shapes) {
    this.svg.querySelector(".over")?.remove();
    this.svg.insertAdjacentHTML("beforeend", `<g class="over">${shapes}</g>`);
  }

  mark(u) {
    const [stage, x0, x1, last] = this.spanAt(u), wanted = (u - x0) / (x1 - x0) * last, found = this.found(stage, wanted);
    if (!found) return this.unmark();
    const x = this.forth(this.placeOf(stage, found.at));
    this.over(`<line class="here" x1="${x}" x2="${x}" y1="${this.top}" y2="${this.height - this.bottom}"/>`);
    this.tip.replaceChildren(element("b", {}, `${stage} ${found.title}`));
    for (const {colour, name, text} of found.rows) {
      const row = this.tip.appendChild(element("span"));
      row.append(element("i", {style: `background:${colour}`}), `${name} `, element("b", {}, text));
    }
    this.tip.hidden = false;
    const box = this.svg.getBoundingClientRect(), own = this.figure.getBoundingClientRect(), scale = box.width / this.width;
    const left = box.left - own.left + x * scale, wide = this.tip.offsetWidth, turned = left + 12 + wide > own.width;
    this.tip.style.left = `${Math.max(0, Math.min(turned ? left - 12 - wide : left + 12, own.width - wide))}px`;
    this.tip.style.top = `${box.top - own.top + this.top * scale}px`;
    this.at = this.placeOf(stage, found.at);
  }

  told(at) { return this.data.unit ? `${at.toLocaleString("en")} ${this.data.unit}` : `step ${at.toLocaleString("en")}`; }

  found(stage, wanted) {
    const rows = [];
    this.lines.forEach((line, i) => {
      const points = line.stages[stage];
      if (!points?.steps.length || this.hidden.has(i)) return;
      const k = nearest(points.steps, wanted);
      rows.push({colour: line.colour, name: line.name, step: points.steps[k], value: points.values[k]});
    });
    if (!rows.length) return null;
    const at = rows.map(row => row.step).reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    for (const row of rows) {
      row.text = row.value === null ? "NaN" : this.data.percent ? this.label(row.value, 4) : String(row.value);
      if (row.step !== at) row.text += ` (${this.told(row.step)})`;
    }
    return {at, title: this.told(at), rows};
  }
}
