// Small building blocks: elements, formats, and text that plotly shows as it is.

/** Make an element; `children` are nodes or text, never markup. */
function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role" || name === "scope" || name === "data-key") {
      node.setAttribute(name, value);
    } else {
      node[name] = value;
    }
  }
  node.append(...children);
  return node;
}

const byId = (id) => document.getElementById(id);

/** Fill a select, keeping the reader's choice where it is still there. */
function fillSelect(select, options, wanted) {
  select.replaceChildren(
    ...options.map(([value, text]) => element("option", { value }, text)),
  );
  const values = options.map(([value]) => value);
  select.value = values.includes(wanted) ? wanted : (values[0] ?? "");
  select.disabled = values.length < 2;
  return select.value;
}

const MISSING = "\u2013";
const PLUS_MINUS = "\u00b1";
const LINE_LENGTH = 44;

const integer = (value) => Math.round(value).toLocaleString("en-US");
const significant = (value) => String(Number(value.toPrecision(3)));
const orMissing = (format) => (value) => (value === null ? MISSING : format(value));

/** A value of a metric as it stands on an axis: a share as percent. */
const scaled = (metric, value) => (metric.isShare ? 100 * value : value);
const percentMark = (metric) => (metric.isShare ? " %" : "");

/** The same as text: one decimal of a percentage, four digits of others; `mean` is that of a spread. */
function written(metric, value, mean = value) {
  const decimals = mean ? 3 - Math.floor(Math.log10(Math.abs(mean))) : 3;
  if (Math.abs(value) >= 1e4 && !metric.isShare) return integer(value);
  return scaled(metric, value).toFixed(metric.isShare ? 1 : Math.min(Math.max(decimals, 0), 100));
}

function spread(metric, mean, std) {
  const text = written(metric, mean);
  return std === null ? text : `${text} ${PLUS_MINUS} ${written(metric, std, mean)}`;
}

/** Student's interval of a mean. */
const interval = (metric, { y, yHalf }) => [y - yHalf, y + yHalf].map((end) => written(metric, end, y)).join(" to ");

/** 20000 as 20 kB: on axes and in texts, as in the figures. */
const bytesTo = (digits) => (value) => {
  const [size, unit] = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([one]) => value >= one) ?? [1, "B"];
  return `${Number((value / size).toPrecision(digits))} ${unit}`;
};
const bytes = bytesTo(3);

const plural = (count, word) => `${integer(count)} ${word}${count === 1 ? "" : "s"}`;

/** Plotly reads tags and entities in texts: show names as they are, broken into short lines. */
function plain(text, length = LINE_LENGTH) {
  const atDelimiter = `.{0,${length - 1}}(?:[ /,=]|.$)`;
  const lines = String(text).match(new RegExp(`${atDelimiter}|.{1,${length}}`, "gsu")) ?? [""];
  const escaped = lines.map((line) =>
    line.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;"),
  );
  return escaped.join("<br>");
}

/** A name that breaks after its delimiters, if it must break. */
function breakable(name) {
  const parts = name.split(/(?<=[=,/])/u);
  return element("span", {}, ...parts.flatMap((part, i) => (i ? [element("wbr"), part] : [part])));
}

const isNarrow = () => window.innerWidth < 600;
const isTouched = () => window.matchMedia("(pointer: coarse)").matches;
/** On a narrow screen it would cover points. */
const hasToolbar = () => !isTouched() && !isNarrow();

/** What all plots share. */
function baseLayout(height) {
  return {
    autosize: true,
    height,
    margin: { l: 56, r: 12, t: hasToolbar() ? 36 : 12, b: 52 }, // no label stands where the toolbar appears
    font: { family: "system-ui, sans-serif", size: 13, color: "#1b1f24" },
    paper_bgcolor: "#fff",
    plot_bgcolor: "#fff",
    showlegend: false,
    hovermode: "closest",
    hoverlabel: { align: "left", bgcolor: "#fff", font: { color: "#1b1f24", size: 12 } },
    // A finger that moves over a plot scrolls the page.
    dragmode: isTouched() ? false : "zoom",
  };
}

const axisStyle = {
  automargin: true,
  gridcolor: "#e6e9ed",
  linecolor: "#8c959f",
  zeroline: false,
  ticks: "outside",
  tickcolor: "#8c959f",
  showline: true,
};

/** Ticks at round numbers of a logarithmic axis, each with its whole label; plotly's where it is short. */
function logTicks(values, format) {
  let [low, high] = [Math.log10(Math.min(...values)), Math.log10(Math.max(...values))];
  if (low === high) [low, high] = [low - 1, high + 1]; // what plotly shows around a single value
  const span = high - low;
  if (span < 0.7) return {};
  const inside = span > 4 ? [1] : span < 1.3 ? [1, 2, 3, 5] : isNarrow() ? (span > 2 ? [1] : [1, 3]) : [1, 2, 5];
  const decades = Math.ceil(high) - Math.floor(low) + 1;
  const tickvals = Array.from({ length: decades }, (_, i) => Math.floor(low) + i).flatMap((power) =>
    inside.map((digit) => Number(`${digit}e${power}`)),
  );
  return { tickvals, ticktext: tickvals.map(format) };
}

/** Ticks at round numbers of bytes, evenly apart, with as many digits as tell them from each other. */
function byteTicks(low, high) {
  const rough = (high - low) / (isNarrow() ? 3 : 6);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((one) => one * power >= rough);
  const first = Math.ceil(low / step);
  const tickvals = Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
  const digits = Math.max(3, Math.ceil(Math.log10(high / step)) + 1);
  return { tickvals, ticktext: tickvals.map(bytesTo(digits)) };
}

/** Give an axis of bytes the ticks of what it shows, which is known when it is drawn or zoomed. */
function tickBytes(node) {
  const { type, range } = node.layout.xaxis;
  const isLog = type === "log";
  const [low, high] = isLog ? range.map((power) => 10 ** power) : range;
  const { tickvals, ticktext } = isLog && high > 5 * low ? logTicks([low, high], bytes) : byteTicks(low, high);
  Plotly.relayout(node, { "xaxis.tickvals": tickvals, "xaxis.ticktext": ticktext });
}

/** Draw, or say why there is nothing to draw; `retick` is called when the x axis shows something else. */
function draw(id, traces, layout, label, whenEmpty, retick = () => {}) {
  const node = byId(id);
  node.setAttribute("aria-label", traces.length ? label : whenEmpty);
  if (!traces.length) {
    Plotly.purge(node);
    node.replaceChildren(element("p", { className: "empty" }, whenEmpty));
    return;
  }
  if (node.querySelector(".empty")) node.replaceChildren();
  const isFirst = !node.on;
  Plotly.react(node, traces, layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: hasToolbar() ? "hover" : false,
    // These and no others: plotly's own set can send the data to its maker's site.
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  });
  node.retick = retick;
  node.retick(node);
  if (isFirst) {
    node.on("plotly_relayout", (change) => {
      if (Object.keys(change).some((key) => /^xaxis\.(auto)?range/u.test(key))) node.retick(node);
    });
  }
}
