// What is compared at one ratio: memory of training, curves, and what pruning kept where.

/** Of each shown method its row at `ratio` (of dense, any), with the most bits: trained once. */
function rowsAtRatio(setting, ratio, isShown) {
  return setting.methods
    .filter((method) => isShown(method.name))
    .map((method) => {
      const rows = setting.rows
        .filter((row) => row.method === method.name && (method.isDense || row.ratio === ratio))
        .sort((a, b) => b.bits - a.bits);
      return [method, rows[0]];
    })
    .filter(([, row]) => row);
}

const barName = (method) => plain(method.name, isNarrow() ? 18 : 30);

function barTrace(found, key, title, number) {
  const known = found.filter(([, row]) => row[key] !== null);
  const panel = number === 1 ? "" : String(number);
  return {
    type: "bar",
    orientation: "h",
    meta: { role: "bars", key },
    y: known.map(([method]) => barName(method)),
    x: known.map(([, row]) => row[key]),
    xaxis: `x${panel}`,
    yaxis: `y${panel}`,
    text: known.map(([, row]) => bytes(row[key])),
    textposition: "outside",
    cliponaxis: false,
    marker: { color: known.map(([method]) => method.colour), opacity: 0.85 },
    hoverinfo: "text",
    hovertext: known.map(
      ([method, row]) =>
        `<b>${plain(method.name)}</b><br>${title}: ${integer(row[key])} bytes (mean, ${plural(row.runs.length, "run")})`,
    ),
  };
}

/** Panels stand side by side, on a phone one below the other with room for the title between. */
function barAxes(found, key, title, number, height) {
  const gap = 90 / height;
  const panel = number === 1 ? "" : String(number);
  const largest = Math.max(...found.map(([, row]) => row[key] ?? 0));
  const side = number - 1;
  const domain = (low) => (isNarrow() ? [0, 1] : low);
  return {
    [`xaxis${panel}`]: {
      ...axisStyle,
      title: { text: title, standoff: 6 },
      range: [0, 1.35 * largest || 1],
      ...byteTicks(0, 1.35 * largest || 1),
      domain: domain(side ? [0.54, 1] : [0, 0.46]),
      anchor: `y${panel}`,
    },
    [`yaxis${panel}`]: {
      ...axisStyle,
      ticks: "",
      showgrid: false,
      autorange: "reversed",
      // Names on the left alone where both panels stand side by side.
      matches: side && !isNarrow() ? "y" : undefined,
      showticklabels: !side || isNarrow(),
      domain: isNarrow() ? (side ? [0, 0.5 - gap / 2] : [0.5 + gap / 2, 1]) : [0, 1],
      anchor: `x${panel}`,
    },
  };
}

function drawMemory(setting, choice) {
  const found = rowsAtRatio(setting, choice.ratio, choice.isShown);
  const panels = [
    ["peak_bytes", "peak above the start"],
    ["train_state_bytes", "train state"],
  ].filter(([key]) => found.some(([, row]) => row[key] !== null));
  const traces = panels.map(([key, title], i) => barTrace(found, key, title, i + 1));
  const numLines = Math.max(1, ...found.map(([method]) => barName(method).split("<br>").length));
  const height = 80 + (14 + 15 * numLines) * found.length;
  const layout = {
    ...baseLayout(isNarrow() ? panels.length * height : height),
    bargap: 0.3,
    ...Object.assign({}, ...panels.map(([key, title], i) =>
      barAxes(found, key, title, i + 1, panels.length * height))),
  };
  draw("memory", traces, layout, `Memory of training of ${plural(found.length, "method")}, in the table too.`,
    "No run that is shown has measured memory here.");
}

function curveTrace(method, curve, ofMetric) {
  return {
    type: "scatter",
    mode: "lines+markers",
    meta: { role: "curve", method: method.name },
    x: curve.steps,
    y: curve.values.map((value) => (value === null ? null : ofMetric(value))),
    line: { color: method.colour, dash: method.dash, width: 1.8 },
    marker: { color: method.colour, symbol: method.symbol, size: 7, maxdisplayed: 7 },
    hoverinfo: "text",
    hovertext: curve.values.map((value, i) =>
      [
        `<b>${plain(method.name)}</b> (${plural(curve.seeds, "run")})`,
        `step ${integer(curve.steps[i])}: ${value === null ? MISSING : significant(ofMetric(value))}`,
      ].join("<br>"),
    ),
  };
}

function drawCurves(setting, choice) {
  const { metric } = setting;
  // Of any split, and the best so far.
  const isPrimary = ["/", "_"].some((mark) => choice.metric.endsWith(mark + metric.short));
  const curves = setting.methods
    .filter((method) => choice.isShown(method.name))
    .map((method) => [method, setting.curves.find((curve) =>
      curve.method === method.name && curve.metric === choice.metric &&
      (method.isDense || curve.ratio === choice.ratio))])
    .filter(([, curve]) => curve?.steps.length);
  const traces = curves.map(([method, curve]) => curveTrace(method, curve, (value) => (isPrimary ? scaled(metric, value) : value)));
  const layout = {
    ...baseLayout(isNarrow() ? 340 : 420),
    xaxis: { ...axisStyle, title: { text: "optimizer step", standoff: 8 }, rangemode: "tozero" },
    yaxis: { ...axisStyle, title: { text: plain(isPrimary ? `${choice.metric}, ${metric.unit}` : choice.metric), standoff: 6 } },
  };
  draw("curves", traces, layout, `${choice.metric} over optimizer steps: ${plural(traces.length, "method")}.`,
    "No run that is shown has a curve of this metric at this ratio.");
}

function densityTrace(method, found, name) {
  return {
    type: "scatter",
    mode: "lines+markers",
    meta: { role: "density", method: method.name },
    x: found.tensors.map(name),
    // A logarithm has no place for 0: such tensors are named below the plot.
    y: found.values.map((value) => (value ? 100 * value : null)),
    line: { color: method.colour, dash: method.dash, width: 1.5 },
    marker: { color: method.colour, symbol: method.symbol, size: 9 },
    hoverinfo: "text",
    hovertext: found.tensors.map(
      (tensor, i) =>
        `<b>${plain(method.name)}</b> (${plural(found.seeds, "run")})<br>${plain(tensor)}<br>kept ${orMissing((v) => `${significant(100 * v)} %`)(found.values[i])}`,
    ),
  };
}

function drawDensities(setting, choice) {
  const shown = setting.methods
    .filter((method) => choice.isShown(method.name))
    .map((method) => [method, setting.densities.find((d) => d.method === method.name && d.ratio === choice.ratio)])
    .filter(([, found]) => found);
  const tensors = [...new Set(shown.flatMap(([, found]) => found.tensors))];
  const isSuffixed = tensors.every((tensor) => tensor.endsWith(".weight"));
  const name = (tensor) => plain(isSuffixed ? tensor.slice(0, -".weight".length) : tensor);
  const positive = shown.flatMap(([, found]) => found.values).filter((value) => value > 0);
  const ticks = positive.length ? logTicks(positive.map((value) => 100 * value), significant) : {};
  const layout = {
    ...baseLayout(isNarrow() ? 380 : 420),
    xaxis: {
      ...axisStyle,
      type: "category",
      categoryorder: "array",
      categoryarray: tensors.map(name),
      tickangle: tensors.length > 6 || isNarrow() ? -60 : 0,
      tickfont: { size: tensors.length > 12 ? 11 : 13 },
    },
    yaxis: { ...axisStyle, title: { text: "kept weights, %", standoff: 6 }, type: "log", exponentformat: "none", ...ticks },
  };
  draw("densities", shown.map(([method, found]) => densityTrace(method, found, name)), layout,
    `Share of kept weights of each tensor: ${plural(shown.length, "method")}.`,
    "No pruned method is shown at this ratio.");
  const empty = shown.flatMap(([method, found]) =>
    found.tensors.filter((_, i) => found.values[i] === 0).map((tensor) => `${tensor} (${method.name})`));
  byId("densities-note").textContent = [
    shown.length ? "Mean over seeds at the end of training." : "",
    empty.length ? `Nothing at all is kept of ${empty.join(", ")}.` : "",
  ].join(" ");
}
