// Values under the pointer. Without this script the page lacks only them.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const number = (v) => (v === 0 || (Math.abs(v) >= 0.01 && Math.abs(v) < 1e5) ? +v.toPrecision(5) : v.toPrecision(4));
  const place = (v) => (data.by === "hours" ? number(v) + " h" : data.by + " " + Math.round(v).toLocaleString("en"));

  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };

  const element = (kind, name, text) => {
    const made = document.createElement(kind);
    made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const told = (line, x) => {
    const i = nearest(line.x, x), row = element("div", "");
    row.append(element("span", "key k" + line.colour + (line.held ? " held" : "")));
    let text = (line.label ? line.label + " " : "") + number(line.y[i]);
    if (line.low && line.low[i] !== line.high[i]) text += " (" + number(line.low[i]) + " to " + number(line.high[i]) + ")";
    row.append(text);
    return row;
  };

  const clear = () => document.querySelectorAll(".cross, .tip").forEach((e) => e.remove());

  // A hairline in every chart, the values in the one that is pointed at.
  const show = (x, pointed) => {
    clear();
    for (const plot of plots) {
      const chart = data.charts[plot.dataset.chart];
      const share = Math.min(1, Math.max(0, x / chart.x_max));
      const cross = element("div", "cross");
      cross.style.left = 100 * share + "%";
      plot.append(cross);
      if (plot !== pointed) continue;
      const first = chart.lines[0], at = first.x[nearest(first.x, x)];
      const tip = element("div", "tip");
      tip.append(element("div", "soft", place(at)));
      for (const line of chart.lines) tip.append(told(line, x));
      tip.style[share < 0.5 ? "left" : "right"] = "calc(" + 100 * (share < 0.5 ? share : 1 - share) + "% + 10px)";
      plot.append(tip);
    }
  };

  for (const plot of plots) {
    const chart = data.charts[plot.dataset.chart];
    const at = (event) => {
      const box = plot.getBoundingClientRect();
      show(((event.clientX - box.left) / box.width) * chart.x_max, plot);
    };
    plot.addEventListener("pointermove", at);
    plot.addEventListener("pointerdown", at);
    plot.addEventListener("pointerleave", clear);
    plot.addEventListener("blur", clear);
    let i = 0;
    plot.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1, PageUp: 20, PageDown: -20, Home: -1e9, End: 1e9 }[event.key];
      if (!move) return;
      event.preventDefault();
      const xs = chart.lines[0].x;
      i = Math.min(xs.length - 1, Math.max(0, i + move));
      show(xs[i], plot);
    });
  }

  // index.html#loss=1200 points at a place: a link to show somebody.
  const point = () => {
    const [id, x] = decodeURIComponent(location.hash.slice(1)).split("=");
    const plot = plots.find((p) => p.parentElement.id === id);
    if (plot && x && isFinite(x)) { show(+x, plot); plot.scrollIntoView({ block: "center" }); }
  };
  addEventListener("hashchange", point);
  point();
  document.documentElement.dataset.script = "ran";
})();
