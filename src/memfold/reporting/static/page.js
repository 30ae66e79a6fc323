// The page: what the reader chose, and drawing it.

const report = JSON.parse(byId("data").textContent);
const hidden = new Set(); // "method NAME" and "published NAME", in every setting
const choice = {
  setting: 0,
  axis: report.axes[0].key,
  bits: "",
  isLog: report.axes[0].isLog,
  isNear: false, // as the setting opens
  single: true,
  ratio: "",
  metric: "", // as the setting is judged
  sort: { key: "y", isDescending: true }, // the best first, as the setting opens
};

const hiddenKey = (name, isPublished = false) => `${isPublished ? "published" : "method"} ${name}`;
const isShown = (name, isPublished) => !hidden.has(hiddenKey(name, isPublished));
const currentSetting = () => report.settings[choice.setting];
const nameOf = (setting) => setting.parts.join(" \u00b7 ");

/** Let plotly draw each method's line and marker once, for the list and the tables. */
async function drawSwatches(lines) {
  const box = element("div", { style: "position:absolute;visibility:hidden" });
  document.body.append(box);
  const traces = lines.map(({ colour, dash, symbol }, i) => ({
    x: [0, 1, 2],
    y: [i, i, i],
    mode: "lines+markers",
    line: { color: colour, dash, width: 2 },
    marker: { color: colour, symbol, size: 9 },
  }));
  await Plotly.newPlot(box, traces, { width: 300, height: 300 }, { staticPlot: true });
  const swatches = [...box.querySelectorAll(".scatterlayer .trace")].map((trace, i) => {
    const path = (d, style) => {
      const node = document.createElementNS("http://www.w3.org/2000/svg", "path");
      node.setAttribute("d", d);
      node.setAttribute("style", style);
      return node;
    };
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const [name, value] of Object.entries({ width: 40, height: 16, viewBox: "-20 -8 40 16", "aria-hidden": "true" })) {
      svg.setAttribute(name, value);
    }
    const point = trace.querySelector(".points path");
    const dashes = trace.querySelector(".js-line").style.strokeDasharray;
    svg.append(
      path("M-20,0H20", `stroke:${lines[i].colour};stroke-width:2;stroke-dasharray:${dashes || "none"}`),
      path(point.getAttribute("d"), point.getAttribute("style")),
    );
    return svg;
  });
  Plotly.purge(box);
  box.remove();
  return swatches;
}

const swatches = new Map();

async function prepareSwatches() {
  const lines = report.settings.flatMap((setting) => [
    ...setting.methods.map((method) => [hiddenKey(method.name), method]),
    ...setting.references.map((reference) => [
      hiddenKey(reference.name, true),
      { ...reference, dash: "dash", symbol: `${reference.symbol}-open` },
    ]),
  ]);
  const drawn = await drawSwatches(lines.map(([, line]) => line));
  lines.forEach(([key], i) => swatches.set(key, drawn[i]));
}

const swatch = (name, isPublished = false) =>
  swatches.get(hiddenKey(name, isPublished))?.cloneNode(true) ?? "";

function methodButton(name, isPublished) {
  const button = element("button", {
    type: "button",
    "aria-pressed": String(isShown(name, isPublished)),
    onclick: () => {
      const key = hiddenKey(name, isPublished);
      hidden.has(key) ? hidden.delete(key) : hidden.add(key);
      button.setAttribute("aria-pressed", String(!hidden.has(key)));
      drawAll();
    },
  }, swatch(name, isPublished), breakable(isPublished ? `${name}, published` : name));
  return element("li", {}, button);
}

function drawMethods() {
  const { methods, references, metric } = currentSetting();
  byId("methods").replaceChildren(
    ...methods.map((method) => methodButton(method.name, false)),
    ...references.map((reference) => methodButton(reference.name, true)),
  );
  byId("key").textContent =
    "Lines join means over seeds, bars are 95 % intervals of the mean (Student's), faint points single runs. " +
    `A ring marks the Pareto front: no method that is shown has ${metric.sign > 0 ? "more" : "lower"} ${metric.title} for less (up to 1 % counts as equal).` +
    (references.length ? " Published curves are dashed, with open markers." : "");
}

function setAll(isVisible) {
  const { methods, references } = currentSetting();
  const keys = [
    ...methods.map((method) => hiddenKey(method.name)),
    ...references.map((reference) => hiddenKey(reference.name, true)),
  ];
  for (const key of keys) isVisible ? hidden.delete(key) : hidden.add(key);
  drawMethods();
  drawAll();
}

function bitsOptions(setting) {
  const single = setting.bits.map((bits) => [String(bits), `${bits}`]);
  return single.length > 1 ? [...single, ["best", "best of all"]] : single;
}

function fillControls() {
  const setting = currentSetting();
  const axes = report.axes.filter((axis) => Object.values(setting.planes[axis.key]).flat().length);
  choice.axis = fillSelect(byId("axis"), axes.map((axis) => [axis.key, axis.title]), choice.axis);
  choice.bits = fillSelect(byId("bits"), bitsOptions(setting), choice.bits);
  const dense = new Set(setting.methods.filter((method) => method.isDense).map((method) => method.name));
  const rows = setting.rows.filter((row) => !dense.has(row.method)).sort((a, b) => b.order - a.order);
  const ratios = [...new Set(rows.map((row) => row.ratio))];
  const wanted = ratios.includes(choice.ratio) ? choice.ratio : setting.opensAt;
  choice.ratio = fillSelect(byId("ratio"), ratios.map((ratio) => [ratio, ratio]), wanted);
  const metrics = [...new Set(setting.curves.map((curve) => curve.metric))].sort();
  const kept = metrics.includes(choice.metric) ? choice.metric : setting.metric.name;
  choice.metric = fillSelect(byId("metric"), metrics.map((metric) => [metric, metric]), kept);
}

function drawQuality() {
  const setting = currentSetting();
  const { metric } = setting;
  const axis = report.axes.find((one) => one.key === choice.axis);
  const { absent, far } = drawPlane(setting, axis, { ...choice, isShown });
  byId("log").checked = choice.isLog;
  byId("near").checked = choice.isNear;
  byId("plane-title").textContent = `${metric.title.replace(/^./u, (first) => first.toUpperCase())} over ${axis.title.split(/[,:]/)[0]}`;
  byId("plane-note").textContent = [
    far.length ? `${plural(far.length, "point")} ${metric.sign > 0 ? "below" : "above"} ("near the best" is on): ${[...new Set(far.map((point) => point.method))].join(", ")}.` : "",
    choice.bits === "best" ? "Of each method, at any number of bits, the points that none of its own beats." : "",
    absent.length ? `Without a value here: ${absent.join(", ")}.` : "",
    setting.references.length && axis.key !== "ratio" ? "Published curves are known over the ratio only." : "",
  ].join(" ");
  const rows = setting.rows.filter((row) => isShown(row.method));
  const best = setting.planes.stored_bytes.best;
  const isBest = (row) => best.some((p) => p.method === row.method && p.bits === row.bits && p.ratio === row.ratio);
  const chosen = rows.filter((row) => (choice.bits === "best" ? isBest(row) : String(row.bits) === choice.bits));
  byId("table-note").textContent = choice.bits === "best"
    ? "Means over n runs, \u00b1 one standard deviation, at the bits that are best over stored bytes; bold: the best of a ratio and bits."
    : `Means over n runs, \u00b1 one standard deviation, at ${choice.bits} bits; bold: the best of a ratio.`;
  drawTable(chosen, choice.sort, metric, swatch, (key) => {
    const opensDescending = key === "y" ? metric.sign > 0 : key !== "method";
    const isDescending = choice.sort.key === key ? !choice.sort.isDescending : opensDescending;
    choice.sort = { key, isDescending };
    drawQuality();
  });
  drawWins(setting, choice.bits, swatch, isShown);
}

function drawAtRatio() {
  const setting = currentSetting();
  drawMemory(setting, { ...choice, isShown });
  drawCurves(setting, { ...choice, isShown });
  drawDensities(setting, { ...choice, isShown });
}

function drawAll() {
  const { methods } = currentSetting();
  const count = methods.filter((method) => isShown(method.name)).length;
  byId("shown").textContent = `(${count} of ${methods.length} shown)`;
  drawQuality();
  drawAtRatio();
}

function openSetting(number) {
  choice.setting = number;
  choice.isNear = currentSetting().opensNear;
  if (choice.sort.key === "y") choice.sort.isDescending = currentSetting().metric.sign > 0;
  for (const [i, tab] of [...byId("settings").children].entries()) {
    tab.setAttribute("aria-selected", String(i === number));
    tab.tabIndex = i === number ? 0 : -1;
  }
  byId("training").textContent = `Training: ${currentSetting().training || "not known"}.`;
  drawMethods();
  fillControls();
  drawAll();
  drawRecipe(currentSetting());
}

function drawTabs() {
  const box = byId("settings");
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = (choice.setting + step + report.settings.length) % report.settings.length;
    openSetting(next);
    box.children[next].focus();
  };
  box.replaceChildren(...report.settings.map((setting, i) => element("button", {
    type: "button", role: "tab", "aria-controls": "content", onclick: () => openSetting(i), onkeydown: move,
  }, nameOf(setting))));
  box.hidden = report.settings.length < 2;
}

function drawSummary() {
  const { settings, problems } = report;
  const numRuns = settings.reduce((sum, setting) => sum + setting.numRuns, 0);
  const methods = new Set(settings.flatMap((setting) => setting.methods.map((method) => method.name)));
  const parts = [
    settings.length === 1 ? nameOf(settings[0]) : plural(settings.length, "setting"),
    plural(numRuns, "run"),
    plural(methods.size, "method"),
  ];
  const link = element("a", { href: "#problems" }, problems.length ? plural(problems.length, "problem") : "no problems");
  byId("summary").replaceChildren(`${parts.join(", ")}, `, element("span", { className: problems.length ? "warning" : "" }, link));
}

function listen() {
  byId("show-all").onclick = () => setAll(true);
  byId("hide-all").onclick = () => setAll(false);
  byId("axis").onchange = (event) => {
    choice.axis = event.target.value;
    choice.isLog = report.axes.find((axis) => axis.key === choice.axis).isLog;
    drawQuality();
  };
  byId("bits").onchange = (event) => { choice.bits = event.target.value; drawQuality(); };
  byId("log").onchange = (event) => { choice.isLog = event.target.checked; drawQuality(); };
  byId("near").onchange = (event) => { choice.isNear = event.target.checked; drawQuality(); };
  byId("single").onchange = (event) => { choice.single = event.target.checked; drawQuality(); };
  byId("ratio").onchange = (event) => { choice.ratio = event.target.value; drawAtRatio(); };
  byId("metric").onchange = (event) => { choice.metric = event.target.value; drawAtRatio(); };
  byId("methods-box").addEventListener("toggle", (event) => {
    if (!event.target.open) event.target.classList.add("folded");
  });
  document.querySelectorAll(".scroll").forEach(watchOverflow);
  window.matchMedia("(max-width: 599px)").addEventListener("change", drawAll);
}

await prepareSwatches();
drawSummary();
drawTabs();
listen();
openSetting(0);
drawProblems();
drawProvenance();
document.documentElement.dataset.ready = "true";
