"use strict";
// Draws the curves of a report. Text from the data is only ever set as text, never as HTML.
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const AXES = {step: "steps", tokens: "tokens", seconds: "training time"};
  const MINUTE = 60, HOUR = 3600, DAY = 86400;
  const TIMES = [0.01, 0.1, 0.5, 1, 2, 5, 10, 15, 30, MINUTE, 2 * MINUTE, 5 * MINUTE, 10 * MINUTE, 15 * MINUTE,
    30 * MINUTE, HOUR, 2 * HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR, DAY, 2 * DAY, 5 * DAY, 10 * DAY, 30 * DAY];
  const DASHES = [[], [6, 4], [2, 3], [10, 4, 2, 4], [1, 5]];
  const state = {axis: "step", log: false};
  const grid = document.getElementById("charts"), controls = document.getElementById("controls");
  let plots = [], busy = false;

  const element = (name, text, parent, kind) => {
    const made = document.createElement(name);
    if (text) made.textContent = text;
    if (kind) made.className = kind;
    if (parent) parent.append(made);
    return made;
  };
  const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // ---- numbers as text ----

  const short = x => {
    const size = Math.abs(x);
    for (const [unit, mark] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (size >= unit) return +(x / unit).toPrecision(4) + mark;
    if (size !== 0 && size < 1e-3) return x.toExponential(2).replace(/\.?0+e/, "e");
    return String(+x.toPrecision(4));
  };
  const bytes = x => {
    for (const [unit, mark] of [[2 ** 40, " TiB"], [2 ** 30, " GiB"], [2 ** 20, " MiB"], [2 ** 10, " KiB"]])
      if (Math.abs(x) >= unit) return +(x / unit).toPrecision(3) + mark;
    return x + " B";
  };
  const percent = x => +(100 * x).toPrecision(4) + "%";
  const duration = x => {
    if (x >= DAY) return Math.floor(x / DAY) + " d" + (x % DAY >= HOUR ? " " + Math.floor(x % DAY / HOUR) + " h" : "");
    if (x >= HOUR) return Math.floor(x / HOUR) + " h" + (x % HOUR >= 60 ? " " + Math.floor(x % HOUR / 60) + " min" : "");
    if (x >= MINUTE) return Math.floor(x / 60) + " min" + (x % 60 >= 1 ? " " + Math.floor(x % 60) + " s" : "");
    return +x.toPrecision(3) + " s";
  };
  const UNITS = {number: short, fraction: percent, bytes};
  const exact = (unit, y) => y == null ? "" : unit === "number" ? String(+y.toPrecision(6)) : UNITS[unit](y);
  const position = x => state.axis === "seconds" ? duration(x) : state.axis === "step" ? x.toLocaleString("en") : short(x);

  // ---- one chart for each title, with the curves of all runs ----

  const titles = [...new Set(runs.flatMap(run => run.charts.map(chart => chart.title)))];
  const several = runs.length > 1;

  function curvesOf(title) {
    const found = [];
    runs.forEach((run, number) => {
      const chart = run.charts.find(one => one.title === title);
      (chart ? chart.curves : []).forEach((curve, index) => {
        // Of several runs a color is a run, of one run a kind of curve.
        found.push({run, curve, unit: chart.unit, hue: `--c${(several ? number : index) % 8}`, index,
          dash: several ? DASHES[index % DASHES.length] : [], name: several ? `${run.name}: ${curve.label}` : curve.label});
      });
    });
    return found.filter(one => one.curve[state.axis]);
  }

  const ends = () => {
    let low = Infinity, high = -Infinity;
    for (const run of runs) for (const chart of run.charts) for (const curve of chart.curves) {
      const x = curve[state.axis];
      if (x && x.length) { low = Math.min(low, x[0]); high = Math.max(high, x[x.length - 1]); }
    }
    return low < high ? [low, high] : [low - 1, low + 1];
  };

  const incidentsOf = number => runs[number].incidents.filter(one => one[state.axis] != null);

  function drawIncidents(u) {
    const {left, top, width, height} = u.bbox, context = u.ctx;
    context.save();
    runs.forEach((run, number) => incidentsOf(number).forEach(one => {
      const x = u.valToPos(one[state.axis], "x", true);
      if (x < left - 1 || x > left + width + 1) return;
      context.strokeStyle = several ? color(`--c${number % 8}`) : color(one.is_fault ? "--fault" : "--note");
      context.fillStyle = context.strokeStyle;
      context.globalAlpha = one.is_fault ? 0.75 : 0.45;
      context.lineWidth = devicePixelRatio;
      context.setLineDash(one.is_fault ? [] : [4 * devicePixelRatio, 4 * devicePixelRatio]);
      context.beginPath();
      context.moveTo(x, top);
      context.lineTo(x, top + height);
      context.stroke();
      if (one.is_fault) {
        const size = 4 * devicePixelRatio;
        context.globalAlpha = 1;
        context.beginPath();
        context.moveTo(x - size, top - size);
        context.lineTo(x + size, top - size);
        context.lineTo(x, top + size / 2);
        context.fill();
      }
    }));
    context.restore();
  }

  function nearIncident(u) {
    let best = null, distance = 8;
    runs.forEach((run, number) => incidentsOf(number).forEach(one => {
      const far = Math.abs(u.valToPos(one[state.axis], "x") - u.cursor.left);
      if (far < distance) [best, distance] = [{run, one}, far];
    }));
    return best;
  }

  const everyPlot = action => {
    if (busy) return;
    busy = true;
    plots.forEach(action);
    busy = false;
  };

  function drawChart(title) {
    const curves = curvesOf(title);
    if (!curves.length) return;
    const card = element("div", "", grid, "chart"), head = element("div", "", card, "head");
    element("h2", title, head);
    const save = element("button", "PNG", head);
    save.title = "save this chart as an image";
    const unit = curves[0].unit, [low, high] = ends();
    const tables = curves.map(({curve}) =>
      [curve[state.axis], curve.y.map(y => state.log && y <= 0 ? null : y)]);
    const data = uPlot.join(tables.map(([x, y]) => {
      const values = new Map(x.map((at, i) => [at, y[i]]));  // Positions are unique, as uPlot needs them.
      return [[...values.keys()], [...values.values()]];
    }));
    const ink = color("--soft"), line = color("--line");
    const axis = {stroke: ink, grid: {stroke: line, width: 1}, ticks: {stroke: line, width: 1, size: 5}, font: "12px system-ui, sans-serif"};
    const note = element("p", "", null, "note");
    const missing = curves.reduce((sum, {curve}) => sum + curve.num_missing, 0);
    const thinned = curves.some(({curve}) => curve.num_points > curve.y.length);
    const resting = [missing ? `${missing.toLocaleString("en")} values are not finite and not drawn` : "",
      thinned ? "thinned: the lowest and the highest of each stretch are kept" : ""].filter(Boolean).join("; ");
    note.textContent = resting;
    const options = {
      width: Math.max(card.clientWidth - 20, 200), height: 220, padding: [10, 16, 0, 0],
      scales: {x: {time: false, range: (u, min, max) => [min, max]}, y: state.log ? {distr: 3, range: (u, min, max) => [min / 1.1, max * 1.1]} : {}},
      axes: [
        {...axis, size: 32, values: (u, splits) => splits.map(x => x == null ? "" : state.axis === "seconds" ? duration(x) : short(x)),
          ...(state.axis === "seconds" ? {incrs: TIMES, space: 80} : {space: 60})},
        {...axis, size: 62, values: (u, splits) => splits.map(y => y == null ? "" : UNITS[unit](y))},
      ],
      series: [{label: AXES[state.axis], value: (u, x) => x == null ? "" : position(x)},
        ...curves.map(({curve, hue, dash, name}) => ({
          label: name, stroke: color(hue), dash: curve.faint ? [] : dash, spanGaps: true,
          width: curve.faint ? 0.6 : curve.y.length > 300 ? 1.2 : 1.8, alpha: curve.faint ? 0.55 : 1, show: !(several && curve.faint),
          points: {show: !curve.faint && curve.y.length <= 40, size: 5, fill: color(hue)},
          value: (u, y) => exact(unit, y),
        }))],
      legend: {live: true},
      cursor: {
        y: false, drag: {x: true, y: false, dist: 5},
        sync: {key: "report", scales: ["x", null], filters: {pub: type => type === "mousemove" || type === "mouseleave"}},
        bind: {dblclick: () => () => everyPlot(one => one.setScale("x", {min: low, max: high}))},
      },
      hooks: {
        draw: [drawIncidents],
        setScale: [(u, key) => {
          if (key === "x") everyPlot(one => one === u || one.setScale("x", {min: u.scales.x.min, max: u.scales.x.max}));
        }],
        setCursor: [u => {
          const near = u.cursor.left >= 0 ? nearIncident(u) : null;
          note.className = near && near.one.is_fault ? "note fault" : "note";
          note.textContent = near
            ? `${several ? near.run.name + ", " : ""}step ${near.one.step.toLocaleString("en")}: ${near.one.name}` +
              (near.one.details ? ` (${near.one.details.slice(0, 160)})` : "")
            : resting;
        }],
      },
    };
    const plot = new uPlot(options, data, card);
    card.append(note);
    busy = true;
    plot.setScale("x", {min: low, max: high});
    busy = false;
    plot.card = card;
    plots.push(plot);
    save.addEventListener("click", () => savePicture(plot, title, curves));
  }

  function savePicture(plot, title, curves) {
    const source = plot.ctx.canvas, scale = devicePixelRatio, row = 18 * scale;
    const target = element("canvas"), context = target.getContext("2d");
    target.width = source.width;
    target.height = source.height + row * (2 + curves.length);
    context.fillStyle = color("--paper");
    context.fillRect(0, 0, target.width, target.height);
    context.fillStyle = color("--ink");
    context.font = `600 ${14 * scale}px system-ui, sans-serif`;
    context.fillText(`${title}, by ${AXES[state.axis]}`, 10 * scale, row);
    context.drawImage(source, 0, 1.5 * row);
    context.font = `${12 * scale}px system-ui, sans-serif`;
    curves.forEach(({name, hue}, i) => {
      const y = source.height + row * (2 + i);
      context.fillStyle = color(hue);
      context.fillRect(10 * scale, y - 9 * scale, 10 * scale, 10 * scale);
      context.fillStyle = color("--ink");
      context.fillText(name, 26 * scale, y);
    });
    const link = element("a");
    link.href = target.toDataURL("image/png");
    link.download = `${title.toLowerCase().replace(/[^a-z0-9]+/g, "-")}.png`;
    link.click();
  }

  // ---- the page ----

  function drawAll() {
    plots.forEach(plot => plot.destroy());
    plots = [];
    grid.replaceChildren();
    titles.forEach(drawChart);
    document.body.dataset.drawn = String(plots.length);
  }

  function buildControls() {
    const group = element("div", "", controls, "group");
    const buttons = Object.keys(AXES).map(axis => {
      const button = element("button", AXES[axis], group);
      button.disabled = !runs.some(run => run.charts.some(chart => chart.curves.some(curve => curve[axis])));
      button.addEventListener("click", () => { state.axis = axis; show(); drawAll(); });
      return [axis, button];
    });
    const log = element("button", "log scale", element("div", "", controls, "group"));
    log.addEventListener("click", () => { state.log = !state.log; show(); drawAll(); });
    element("span", "drag to zoom, double-click to zoom out, click a name to hide its curve", controls, "hint");
    const show = () => {
      buttons.forEach(([axis, button]) => button.setAttribute("aria-pressed", String(axis === state.axis)));
      log.setAttribute("aria-pressed", String(state.log));
    };
    show();
    controls.hidden = !titles.length;
  }

  buildControls();
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  new ResizeObserver(() => plots.forEach(plot => {
    const width = Math.max(plot.card.clientWidth - 20, 200);
    if (width !== plot.width) plot.setSize({width, height: plot.height});
  })).observe(grid);
})();
