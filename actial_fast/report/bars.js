// Stacked bars of one stage (bars.py), and the beginning of it all: each figure its chart.

class Bars extends Chart {
  read() {
    this.lines = this.data.parts.map(part => ({...part, stages: {}}));
    this.data.guides = [];
  }

  bars() {  // of the steps in view, so many together that they can be told apart
    const [[stage, , , last]] = this.data.spans, {together, bars, steps, most} = this.data, inside = [];
    bars.forEach((bar, k) => {
      const ends = [bar * together, Math.min(last, (bar + 1) * together)].map(step => this.placeOf(stage, step));
      if (ends[1] > this.view[0] + 0.01 && ends[0] < this.view[1] - 0.01) inside.push(k);
    });
    const least = Math.min(...inside.map(k => bars[k])), reach = Math.max(...inside.map(k => bars[k])) - least + 1;
    const size = Math.ceil(reach / most), joined = new Map();
    for (const k of inside) {
      const place = Math.floor((bars[k] - least) / size), own = joined.get(place) ?? {members: []};
      own.members.push(k);
      joined.set(place, own);
    }
    return [...joined].map(([place, {members}]) => {
      const first = (least + place * size) * together, count = members.reduce((sum, k) => sum + steps[k], 0);
      const means = this.lines.map(part => members.reduce((sum, k) => sum + (part.means[k] ?? 0) * steps[k], 0) / count);
      return {first, end: Math.min(last, first + size * together), means};
    });
  }

  shapes() {
    const [[stage]] = this.data.spans, bars = this.bars(), shown = bar => bar.means.filter((_, i) => !this.hidden.has(i));
    const totals = bars.map(bar => shown(bar).reduce((a, b) => a + b, 0)), sorted = [...totals].sort((a, b) => a - b);
    const high = Math.min(sorted.at(-1), this.data.tall * sorted[sorted.length >> 1]) || sorted.at(-1) || 1, y = this.y(0, 1.04 * high);
    let out = this.frame(ticks(0, 1.04 * high, 5), y);
    bars.forEach(bar => {
      let base = 0;
      const from = Math.max(this.forth(this.placeOf(stage, bar.first)), this.left);
      const to = Math.min(this.forth(this.placeOf(stage, bar.end)), this.width - this.right), wide = Math.max((to - from) * 0.85, to - from - 1);
      bar.means.forEach((mean, i) => {
        if (this.hidden.has(i)) return;
        const [low, top] = [Math.min(base, high), Math.min(base + mean, high)];
        base += mean;
        if (top > low) {
          out += `<rect style="fill:${this.lines[i].colour}" x="${from}" y="${y(top)}" width="${wide}" height="${y(low) - y(top)}"/>`;
        }
      });
    });
    return out;
  }

  found(stage, wanted) {
    const bars = this.bars(), bar = bars.find(each => wanted > each.first - 1e-6 && wanted <= each.end + 1e-6);
    if (!bar) return null;
    const rows = this.lines.map((part, i) => ({colour: part.colour, name: part.name, text: number(bar.means[i], 4)}));
    const all = bar.means.filter((_, i) => !this.hidden.has(i)).reduce((a, b) => a + b, 0);
    const title = bar.end - bar.first > 1 ? `steps ${bar.first + 1} to ${bar.end}, mean` : `step ${bar.end}`;
    return {at: (bar.first + bar.end) / 2, title, rows: [...rows.filter((_, i) => !this.hidden.has(i)), {colour: "none", name: "together", text: number(all, 4)}]};
  }

  step(by) {
    const [[stage]] = this.data.spans, middles = this.bars().map(bar => this.placeOf(stage, (bar.first + bar.end) / 2));
    const now = this.at === undefined ? (by > 0 ? -1 : middles.length) : nearest(middles, this.at);
    if (middles.length) this.mark(middles[Math.min(Math.max(now + by, 0), middles.length - 1)]);
  }
}

for (const figure of document.querySelectorAll("figure")) {
  const data = figure.querySelector("script");
  if (data) figure.chart = data.textContent.includes('"parts":') ? new Bars(figure) : new Chart(figure);
}
