// The plane: what is kept over bytes, ratio, memory or time.

const INK = "#1b1f24";
const REFERENCE = "#57606a";
const SINGLE_SIZE = 6;
const MOST_LISTED = 5;
const LABEL_LENGTH = 9; // characters of a line

const nameOfRun = ({ seed, fold }) => `seed ${seed}${fold === null ? "" : `, fold ${fold}`}`;

const describeTime = (time, trainings) =>
  `time ${time === null ? MISSING : `${significant(time)} s`}${trainings > 1 ? ` (${significant(trainings)} trainings)` : ""}`;

function describeRun(run, lines = []) {
  const { stored_bytes: stored, peak_bytes: peak, fit_seconds: time, trainings } = run.x;
  return [
    ...lines,
    `${nameOfRun(run)}, ratio ${significant(run.ratio)}, ${run.bits} bits`,
    `stored ${integer(stored)} bytes`,
    `peak of training ${orMissing(bytes)(peak)}, ${describeTime(time, trainings)}`,
    plain(run.folder),
  ].join("<br>");
}

/** What a mean says when it is pointed at: the mean, then its runs. */
function describePoint(point, { runs, metric }) {
  const members = point.runs.map((number) => runs[number]);
  const mean = (key) => {
    const known = members.map((run) => run.x[key]).filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  };
  return [
    `<b>${plain(point.method)}</b>`,
    `ratio ${point.ratio}, ${point.bits} bits`,
    `${plain(metric.title)} ${spread(metric, point.y, point.yStd)}${percentMark(metric)} (${plural(members.length, "run")})`,
    ...(point.yHalf === null ? [] : [`95 %: ${interval(metric, point)}`]),
    `stored ${integer(mean("stored_bytes"))} bytes`,
    `peak of training ${orMissing(bytes)(mean("peak_bytes"))}, ${describeTime(mean("fit_seconds"), mean("trainings"))}`,
    ...members
      .slice(0, MOST_LISTED)
      .map((run) => `${nameOfRun(run)}: ${written(metric, run.y)}${percentMark(metric)}, ${plain(run.folder)}`),
    ...(members.length > MOST_LISTED ? [`and ${members.length - MOST_LISTED} more`] : []),
  ].join("<br>");
}

/**
 * Of all points, those that none beats: its x no higher, but for a negligible part, its y no worse,
 * and one of them better.
 */
function paretoFront(points, negligible, { sign }) {
  const gain = (one, other) => sign * (one.y - other.y);
  const beats = (one, other) =>
    one.x <= other.x * (1 + negligible) && gain(one, other) >= 0 && (one.x < other.x || gain(one, other) > 0);
  return [...points]
    .sort((a, b) => a.x - b.x || gain(b, a))
    .filter((point) => !points.some((other) => beats(other, point)));
}

function methodTrace(method, points, setting) {
  const ofMetric = (value) => scaled(setting.metric, value);
  return {
    type: "scatter",
    mode: "lines+markers",
    name: plain(method.name),
    meta: { role: "method", method: method.name },
    x: points.map((point) => point.x),
    y: points.map((point) => ofMetric(point.y)),
    error_y: {
      type: "data",
      array: points.map((point) => ofMetric(point.yHalf ?? 0)),
      visible: points.some((point) => point.yHalf !== null),
      color: method.colour,
      thickness: 1.2,
      width: 3,
    },
    line: { color: method.colour, dash: method.dash, width: 2 },
    marker: { color: method.colour, symbol: method.symbol, size: 9 },
    hoverinfo: "skip", // its targets answer
    hovertext: points.map((point) => describePoint(point, setting)),
  };
}

function singleRunsTrace(method, points, { runs, metric }, axis) {
  const members = points.flatMap((point) => (point.runs.length > 1 ? point.runs : []));
  const shown = members.map((number) => runs[number]);
  return {
    type: "scatter",
    mode: "markers",
    meta: { role: "runs", method: method.name },
    x: shown.map((run) => run.x[axis.key]),
    y: shown.map((run) => scaled(metric, run.y)),
    marker: { color: method.colour, symbol: method.symbol, size: SINGLE_SIZE },
    opacity: 0.4,
    hoverinfo: "text",
    hovertext: shown.map((run) =>
      describeRun(run, [
        `<b>${plain(method.name)}</b>, one run`,
        `${plain(metric.title)} ${written(metric, run.y)}${percentMark(metric)}`,
      ]),
    ),
  };
}

function frontTrace(points, metric) {
  return {
    type: "scatter",
    mode: "markers",
    meta: { role: "front" },
    x: points.map((point) => point.x),
    y: points.map((point) => scaled(metric, point.y)),
    marker: { symbol: "circle-open", size: 17, color: INK, line: { width: 1.6 } },
    hoverinfo: "skip",
  };
}

function publishedTrace(reference, metric) {
  return {
    type: "scatter",
    mode: "lines+markers",
    meta: { role: "published", method: reference.name },
    x: reference.x,
    y: reference.y.map((value) => scaled(metric, value)),
    line: { color: reference.colour, dash: "dash", width: 1.5 },
    marker: { color: reference.colour, symbol: `${reference.symbol}-open`, size: 8 },
    hoverinfo: "skip", // its targets answer
    hovertext: reference.x.map(
      (ratio, i) =>
        `<b>${plain(reference.name)}</b>, published<br>ratio ${significant(ratio)}<br>${plain(metric.title)} ${written(metric, reference.y[i])}${percentMark(metric)}`,
    ),
  };
}

/**
 * What answers when a mean is pointed at. Of markers that overlap, plotly chooses the smallest, so
 * single runs would hide their mean; of equally small ones the last, so these come last of all.
 */
function targetsTrace(traces) {
  return {
    type: "scatter",
    mode: "markers",
    meta: { role: "targets" },
    x: traces.flatMap((trace) => trace.x),
    y: traces.flatMap((trace) => trace.y),
    marker: {
      color: traces.flatMap((trace) => trace.x.map(() => trace.marker.color)),
      size: SINGLE_SIZE,
      opacity: 0,
    },
    hoverinfo: "text",
    hovertext: traces.flatMap((trace) => trace.hovertext),
  };
}

/** The dense model's mean, with its values at the most bits shown: what there is to lose. */
function denseMean(setting, bits, isShown) {
  const dense = setting.methods.filter((method) => method.isDense && method.isOfSetting && isShown(method.name));
  const rows = setting.rows.filter((row) => dense.some((method) => method.name === row.method));
  const chosen = rows.filter((row) => String(row.bits) === bits);
  return (chosen.length ? chosen : rows).sort((a, b) => b.bits - a.bits)[0] ?? null;
}

function denseLine(row, metric) {
  return {
    type: "line",
    xref: "paper",
    x0: 0,
    x1: 1,
    y0: scaled(metric, row.y),
    y1: scaled(metric, row.y),
    line: { color: REFERENCE, width: 1.2, dash: "dash" },
    layer: "below",
  };
}

/** The line's name stands in the margin: anywhere inside there may be points. */
function denseLabel(row, metric) {
  return {
    text: `${plain(row.method, LABEL_LENGTH)}<br>${written(metric, row.y)}${percentMark(metric)}`,
    xref: "paper",
    x: 1,
    xanchor: "left",
    y: scaled(metric, row.y),
    align: "left",
    showarrow: false,
    font: { size: 12, color: REFERENCE },
  };
}

const isOfBytes = (axis) => axis.key.endsWith("_bytes");

function planeAxis(axis, isLog, points) {
  const style = {
    ...axisStyle,
    title: { text: axis.title, standoff: 8 },
    type: isLog ? "log" : "linear",
    exponentformat: "none",
  };
  const values = [...new Set(points.map((point) => point.x))].sort((a, b) => a - b);
  if (!isLog || !values.length || isOfBytes(axis)) return style;
  // The ratios that were asked for are few: each has its own tick.
  if (values.length <= 8) return { ...style, tickvals: values, ticktext: values.map(significant) };
  return { ...style, ...logTicks(values, significant) };
}

/** What is near the best of `points`, between the worst of it and what is a little better than all. */
function nearRange(points, { sign, near }) {
  const best = sign * Math.max(...points.map((point) => sign * point.y));
  return [best - sign * near, best + (sign * near) / 10];
}

/** All values, or those near the best where others have collapsed. */
function metricAxis(points, isNear, metric) {
  const style = { ...axisStyle, title: { text: plain(metric.axis), standoff: 6 } };
  if (isNear && points.length) {
    const range = nearRange(points, metric).map((value) => scaled(metric, value));
    return { ...style, range: range.sort((a, b) => a - b) };
  }
  // An interval may reach beyond all and nothing; shares do not.
  return metric.isShare ? { ...style, autorangeoptions: { clipmin: -2, clipmax: 102 } } : style;
}

/** Draw the plane of one setting; return what a reader must know besides. */
function drawPlane(setting, axis, choice) {
  const { metric } = setting;
  const points = (setting.planes[axis.key][choice.bits] ?? []).filter(
    (p) => choice.isShown(p.method) && (p.x > 0 || !choice.isLog), // a logarithm has no place for 0
  );
  const methods = setting.methods.filter((method) => choice.isShown(method.name));
  const drawn = methods
    .map((method) => [method, points.filter((point) => point.method === method.name)])
    .filter(([, own]) => own.length);
  const published =
    axis.key === "ratio" ? setting.references.filter((r) => choice.isShown(r.name, true)) : [];
  const front = paretoFront(points, report.negligibleCost, metric);
  const means = [
    ...published.map((reference) => publishedTrace(reference, metric)),
    ...drawn.map(([method, own]) => methodTrace(method, own, setting)),
  ];
  const traces = [
    ...(choice.single ? drawn.map(([method, own]) => singleRunsTrace(method, own, setting, axis)) : []),
    ...means,
    ...(front.length ? [frontTrace(front, metric)] : []),
    ...(means.length ? [targetsTrace(means)] : []),
  ];
  const dense = denseMean(setting, choice.bits, choice.isShown);
  const shared = baseLayout(isNarrow() ? 400 : 520);
  const hasLongName = dense && dense.method.length > LABEL_LENGTH - 2;
  const layout = {
    ...shared,
    margin: dense ? { ...shared.margin, r: hasLongName ? 72 : 52 } : shared.margin,
    xaxis: planeAxis(axis, choice.isLog, points),
    yaxis: metricAxis(points, choice.isNear, metric),
    shapes: dense ? [denseLine(dense, metric)] : [],
    annotations: dense ? [denseLabel(dense, metric)] : [],
  };
  const label = `Test ${metric.title} over ${axis.title}: ${plural(drawn.length, "method")}. The numbers are in the table below.`;
  draw("plane", traces, layout, label, "No method that is shown has a point here.",
    isOfBytes(axis) ? tickBytes : undefined);
  const absent = methods.filter((method) => !drawn.some(([other]) => other === method));
  const isFar = (point) => metric.sign * point.y < metric.sign * nearRange(points, metric)[0];
  return { absent: absent.map((method) => method.name), far: choice.isNear ? points.filter(isFar) : [] };
}
