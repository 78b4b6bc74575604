// Draws the curves of the page with uPlot: values under the pointer, runs and series to choose, three horizontal axes,
// running means, and a file of what is drawn. Without it the page still has all tables.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("curves").textContent);
  const AXES = { steps: "optimizer step", tokens: "tokens", hours: "hours" };
  const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 5e6, 1e7];
  const HEIGHT = 210;
  const KEY = `trl-ext report ${document.title}`;
  const tools = document.getElementById("tools");
  const state = Object.assign({ axis: "steps", smoothing: 7, runs: [], series: [] }, remembered());

  // --- what is remembered while the page of a running run loads itself again

  function remembered() {
    try { return JSON.parse(sessionStorage.getItem(KEY)) || {}; } catch { return {}; }
  }

  function remember() {
    try { sessionStorage.setItem(KEY, JSON.stringify(state)); } catch { /* a browser that stores nothing */ }
  }

  // --- small things

  const colourOf = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const faint = (colour, share) => colour + Math.round(255 * share).toString(16).padStart(2, "0");
  const array = index => data.arrays[index];

  function make(parent, tag, properties = {}) {
    return parent.appendChild(Object.assign(document.createElement(tag), properties));
  }

  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e6 && size < 1e15) {
      const [unit, name] = size >= 1e12 ? [1e12, "T"] : size >= 1e9 ? [1e9, "G"] : [1e6, "M"];
      return `${Number((value / unit).toPrecision(4))}${name}`;
    }
    if (size !== 0 && size < 1e-3) return String(Number(value.toPrecision(3)).toExponential()).replace("-", "−");
    return String(Number(value.toPrecision(5))).replace("-", "−");
  }

  function runningMean(values, window) {
    return values.map((_, i) => {
      const part = values.slice(Math.max(0, i + 1 - window), i + 1).filter(value => value !== null);
      return part.length ? part.reduce((a, b) => a + b, 0) / part.length : null;
    });
  }

  // Where a step of a run is on the chosen axis; null if the run has not logged that.
  function place(run, step) {
    if (state.axis === "steps") return step;
    const known = data.runs[run][state.axis];
    if (!known) return null;
    const [steps, values] = known.map(array);
    const next = steps.findIndex(each => each >= step);
    if (next < 0) return values[values.length - 1];
    const [from, low] = next ? [steps[next - 1], values[next - 1]] : [0, 0];
    return steps[next] === from ? values[next] : low + (values[next] - low) * (step - from) / (steps[next] - from);
  }

  function nearest(places, x) {
    let best = 0;
    places.forEach((each, i) => { if (Math.abs(each - x) < Math.abs(places[best] - x)) best = i; });
    return best;
  }

  // --- a chart

  const nameOf = (panel, curve) => `${panel.title}: ${curve.label}`;
  const isChosen = (panel, curve) =>
    !state.runs.includes(data.runs[curve.run].name) && !state.series.includes(nameOf(panel, curve));

  // The chosen curves, with the arrays that they name.
  function curvesOf(panel, chart) {
    return chart.curves.filter(curve => isChosen(panel, curve)).map(curve => {
      const [steps, y, low, high] = [curve.steps, curve.y, curve.low, curve.high].map(array);
      const x = curve.x !== undefined ? array(curve.x) : steps.map(step => place(curve.run, step));
      return { ...curve, steps, y, low, high, x };
    }).filter(curve => !curve.x.includes(null));
  }

  function plot(element, panel, chart) {
    const curves = curvesOf(panel, chart);
    const places = [...new Set(curves.flatMap(curve => curve.x))].sort((a, b) => a - b);
    const index = new Map(places.map((x, i) => [x, i]));
    const values = [places], series = [{}], bands = [], marks = [];

    function add(curve, y, look) {
      const aligned = new Array(places.length).fill(null);
      curve.x.forEach((x, i) => { aligned[index.get(x)] = y[i]; });
      values.push(aligned);
      return series.push({ spanGaps: true, width: 1.8, points: { show: false }, ...look }) - 1;
    }

    function between(curve, colour) {
      const unseen = { stroke: "transparent", width: 0 };
      bands.push({ series: [add(curve, curve.high, unseen), add(curve, curve.low, unseen)], fill: colour });
    }

    for (const curve of curves) {
      const stroke = colourOf(curve.colour);
      const unseen = { paths: () => null };
      if (curve.kind === "area") between(curve, faint(stroke, .5));
      else if (curve.kind === "spread") between(curve, faint(stroke, .15));
      else if (curve.kind === "steps") add(curve, curve.y, { stroke, paths: uPlot.paths.stepped({ align: 1 }) });
      else if (curve.kind === "line") {
        if (curve.low) between(curve, faint(stroke, .15));
        const dash = curve.dashed ? [6, 4] : undefined;
        const window = curve.smooth && curve.y.length > 30 ? Math.round(curve.y.length * state.smoothing / 100) : 0;
        const points = { show: curve.y.length <= 60, size: 5, fill: stroke };
        if (window < 2) add(curve, curve.y, { stroke, dash, points });
        else {
          add(curve, curve.y, { stroke: faint(stroke, .3), width: 1 });
          add(curve, runningMean(curve.y, window), { stroke, dash });
        }
      } else {
        for (const end of [curve.low, curve.high]) if (end) add(curve, end, unseen);
        if (curve.kind === "dots" || curve.x.some((x, i) => i && x < curve.x[i - 1])) add(curve, curve.y, unseen);
        else add(curve, curve.y, { stroke, width: 1, dash: [2, 3] });
        marks.push([curve, stroke]);
      }
    }

    const fixed = [chart.bottom, chart.top, chart.level && chart.level[0]];
    if (chart.band && !chart.band.along_x) fixed.push(chart.band.low, chart.band.high);
    const ends = fixed.filter(end => end !== null && end !== undefined);

    function range(u, low, high) {
      [low, high] = [Math.min(low ?? Infinity, ...ends), Math.max(high ?? -Infinity, ...ends)];
      if (!Number.isFinite(low)) return [0, 1];
      const size = Math.max(Math.abs(low), Math.abs(high));
      const room = (high - low > 1e-6 * size ? high - low : size || 1) * .06;  // rounding is no change
      return [low === chart.bottom ? low : low - room, high + room];
    }

    // Behind the curves: the healthy band, and the level to compare with.
    function drawBehind(u) {
      const { left, top, width, height } = u.bbox;
      const { ctx } = u;
      ctx.save();
      ctx.beginPath();
      ctx.rect(left, top, width, height);
      ctx.clip();
      if (chart.band) {
        const [a, b] = [chart.band.low, chart.band.high].map(end => u.valToPos(end, chart.band.along_x ? "x" : "y", true));
        ctx.fillStyle = colourOf("band");
        if (chart.band.along_x) ctx.fillRect(a, top, b - a, height);
        else ctx.fillRect(left, b, width, a - b);
      }
      if (chart.level) {
        const y = u.valToPos(chart.level[0], "y", true);
        ctx.strokeStyle = colourOf("muted");
        ctx.setLineDash([6, 4]);
        ctx.beginPath();
        ctx.moveTo(left, y);
        ctx.lineTo(left + width, y);
        ctx.stroke();
      }
      ctx.restore();
    }

    // Above them: dots, and diamonds with their intervals.
    function drawMarks(u) {
      const { ctx } = u, { left, top, width, height } = u.bbox, pixel = devicePixelRatio;
      ctx.save();
      ctx.beginPath();
      ctx.rect(left - 6 * pixel, top - 6 * pixel, width + 12 * pixel, height + 12 * pixel);
      ctx.clip();
      ctx.setLineDash([]);  // uPlot leaves that of the last curve
      for (const [curve, colour] of marks) curve.y.forEach((value, i) => {
        if (value === null) return;
        const x = u.valToPos(curve.x[i], "x", true), y = u.valToPos(value, "y", true);
        ctx.beginPath();
        if (curve.kind === "dots") {
          ctx.fillStyle = faint(colour, .25 + .75 * (i + 1) / curve.y.length);
          ctx.arc(x, y, 3 * pixel, 0, 2 * Math.PI);
          ctx.fill();
          return;
        }
        ctx.strokeStyle = ctx.fillStyle = colour;
        ctx.lineWidth = 1.2 * pixel;
        if (curve.low && curve.low[i] !== null) {
          ctx.moveTo(x, u.valToPos(curve.low[i], "y", true));
          ctx.lineTo(x, u.valToPos(curve.high[i], "y", true));
          ctx.stroke();
          ctx.beginPath();
        }
        const size = 4.5 * pixel;
        [[0, -size], [size, 0], [0, size], [-size, 0]].forEach(([dx, dy]) => ctx.lineTo(x + dx, y + dy));
        ctx.closePath();
        ctx.fill();
        ctx.strokeStyle = colourOf("ink");
        ctx.stroke();
      });
      ctx.restore();
    }

    const tip = document.createElement("div");
    tip.className = "tip";

    function read(u) {
      tip.replaceChildren();
      tip.hidden = u.cursor.idx === null || u.cursor.idx === undefined || u.cursor.left < 0;
      if (tip.hidden) return;
      const x = places[u.cursor.idx];
      const ofStep = !chart.xlabel && state.axis === "steps";
      make(tip, "div", { className: "at", textContent: ofStep ? `step ${x}` : `${number(x)} ${AXES[state.axis]}` });
      if (chart.xlabel) tip.firstChild.textContent = `${chart.xlabel}; ${chart.ylabel}`;
      const near = (places[places.length - 1] - places[0]) / 30;
      for (const curve of curves) {
        const i = nearest(curve.x, x);
        if (chart.xlabel && Math.abs(curve.x[i] - x) > near) continue;  // a run that never came there
        const row = make(tip, "div");
        make(row, "span", { className: "chip" }).style.background = colourOf(curve.colour);
        const what = curve.label && curve.label.replace(/, (95% interval|later ones stronger)$/, "");  // of the legend
        const who = [data.runs.length > 1 ? data.runs[curve.run].name : "", what].filter(Boolean).join(", ");
        const ends = curve.low ? `${number(curve.low[i])} to ${number(curve.high[i])}` : "";
        let said = curve.kind === "spread" ? ends : number(curve.y[i]);
        if (ends && !["area", "spread"].includes(curve.kind)) said += ` (${ends})`;
        if (chart.xlabel) said = `${number(curve.x[i])}; ${said}`;
        const elsewhere = curve.x[i] === x && ofStep ? "" : ` at step ${curve.steps[i]}`;
        make(row, "span", { textContent: `${who}${who ? ": " : ""}${said}${elsewhere}` });
      }
      // Beside the pointer on the side of the middle, and whole within the window.
      const { left, width } = u.over.getBoundingClientRect(), room = document.documentElement.clientWidth - tip.offsetWidth - 4;
      const wanted = left + u.cursor.left + (u.cursor.left > width / 2 ? -tip.offsetWidth - 12 : 12);
      tip.style.left = `${Math.max(4, Math.min(wanted, room)) - left}px`;
    }

    element.replaceChildren();
    const ink = colourOf("ink"), rule = colourOf("rule");
    const axis = { stroke: ink, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule, width: 1 }, font: "12px system-ui, sans-serif" };
    const ticks = (u, splits) => splits.map(number);
    const room = (u, shown) => Math.max(40, 22 + 7 * Math.max(0, ...(shown || []).map(each => each.length)));
    const u = new uPlot({
      width: element.clientWidth, height: HEIGHT, series, bands, legend: { show: false },
      padding: [10, 22, 0, 0],
      scales: { x: { time: false, range: (u, low, high) => low === high ? [low - 1, high + 1] : [low, high] }, y: { range } },
      axes: [
        { ...axis, values: ticks, size: 30, ...(chart.xlabel || state.axis !== "steps" ? {} : { incrs: WHOLE }) },
        { ...axis, values: ticks, size: room },
      ],
      cursor: { y: false, points: { show: false }, drag: { x: true, y: false } },
      hooks: { drawClear: [drawBehind], draw: [drawMarks], setCursor: [read] },
    }, values, element);
    u.over.append(tip);
    tip.hidden = true;
    u.places = places;
    return u;
  }

  // --- the figures

  const shown = [];  // of every chart: its element, panel, description, and uPlot once it is drawn

  function legend(element, panel, chart) {
    const labels = [...new Set(chart.curves.map(curve => curve.label).filter(Boolean))];
    for (const label of labels) {
      const curve = chart.curves.find(each => each.label === label);
      const item = make(element, labels.length > 1 ? "label" : "span");
      if (labels.length > 1) {
        const box = make(item, "input", { type: "checkbox", checked: isOn(panel, curve) });
        box.addEventListener("change", () => {
          const name = nameOf(panel, curve);
          state.series = state.series.filter(each => each !== name).concat(box.checked ? [] : [name]);
          update();
        });
      }
      const key = make(item, "span", { className: `key ${curve.kind.replace(" ", "-")}${curve.dashed ? " dashed" : ""}` });
      key.style.setProperty("--colour", `var(--${data.runs.length > 1 && !panel.own ? "ink" : curve.colour})`);
      item.append(label);
    }
    for (const [kind, label] of [["band", chart.band && chart.band.label], ["level", chart.level && chart.level[1]]]) {
      if (!label) continue;
      const item = make(element, "span");
      make(item, "span", { className: `key ${kind}` });
      item.append(label);
    }
  }

  const isOn = (panel, curve) => !state.series.includes(nameOf(panel, curve));

  function download(panel) {
    const quoted = value => `"${String(value ?? "").replaceAll('"', '""')}"`;
    const rows = [["chart", "run", "series", "step", "horizontal", "value", "low", "high"]];
    for (const chart of panel.charts) for (const curve of curvesOf(panel, chart)) curve.y.forEach((value, i) => {
      const ends = [curve.low, curve.high].map(end => end ? end[i] : null);
      rows.push([chart.ylabel, data.runs[curve.run].name, curve.label, curve.steps[i], curve.x[i], value, ...ends]);
    });
    const text = rows.map(row => row.map(quoted).join(",")).join("\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = `${panel.title.toLowerCase().replace(/[^a-z0-9]+/g, "-")}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  for (const figure of document.querySelectorAll("figure[data-panel]")) {
    const panel = data.panels[Number(figure.dataset.panel)];
    panel.own = figure.dataset.run !== undefined;
    figure.querySelectorAll(".chart").forEach((element, i) => {
      const chart = panel.charts[i];
      const one = { element: element.querySelector(".plot"), panel, chart };
      legend(element.querySelector(".legend-of-chart"), panel, chart);
      one.element.tabIndex = 0;
      one.element.addEventListener("focus", () => { if (one.u) one.u.over.querySelector(".tip").ariaLive = "polite"; });
      one.element.addEventListener("keydown", event => {
        const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!by || !one.u || !one.u.places.length) return;
        event.preventDefault();
        const last = one.u.places.length - 1;
        const next = Math.min(last, Math.max(0, (one.u.cursor.idx ?? (by > 0 ? -1 : last + 1)) + by));
        one.u.setCursor({ left: one.u.valToPos(one.u.places[next], "x"), top: 0 });
      });
      one.element.addEventListener("blur", () => one.u && one.u.setCursor({ left: -10, top: -10 }));
      shown.push(one);
    });
    const button = figure.querySelector("button");
    button.hidden = false;
    button.addEventListener("click", () => download(panel));
  }

  function draw(one) {
    if (one.u) one.u.destroy();
    one.u = one.element.clientWidth ? plot(one.element, one.panel, one.chart) : null;
    one.element.parentElement.querySelector(".xlabel").textContent = one.chart.xlabel || AXES[state.axis];
  }

  function update() {
    document.querySelectorAll("[data-run]").forEach(element => {
      element.hidden = state.runs.includes(data.runs[Number(element.dataset.run)].name);
    });
    shown.forEach(draw);
    remember();
  }

  // --- the tools above them

  tools.hidden = false;
  for (const input of tools.querySelectorAll("input")) {
    if (input.name === "axis") {
      input.disabled = input.value !== "steps" && !data.runs.some(run => run[input.value]);
      if (input.disabled && state.axis === input.value) state.axis = "steps";
      input.checked = state.axis === input.value;
    } else if (input.name === "run") input.checked = !state.runs.includes(data.runs[Number(input.value)].name);
    else input.value = state.smoothing;
  }
  tools.addEventListener("input", event => {
    const { name, value } = event.target;
    if (name === "axis") state.axis = value;
    else if (name === "smoothing") state.smoothing = Number(value);
    else state.runs = [...tools.querySelectorAll("input[name=run]")].filter(box => !box.checked).map(box => data.runs[Number(box.value)].name);
    update();
  });

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update);
  addEventListener("resize", () => shown.forEach(one => {
    if (one.u && one.u.width !== one.element.clientWidth) draw(one);
  }));
  update();
})();
