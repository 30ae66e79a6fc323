// Tables: numbers, wins, problems, provenance.

const COLUMNS = [
  { key: "method", title: "method" },
  { key: "y", format: (value, row, metric) => spread(metric, value, row.yStd) },
  { key: "stored_bytes", title: "stored bytes", format: integer },
  { key: "order", title: "ratio", format: (_, row) => row.ratio },
  { key: "bits", title: "bits", format: integer },
  { key: "seeds", title: "n", value: (row) => row.runs.length, format: integer },
  { key: "stored_ratio", title: "stored ratio", format: significant },
  { key: "train_state_bytes", title: "train state", format: bytes },
  { key: "peak_bytes", title: "peak memory", format: bytes },
  { key: "step_seconds", title: "step, ms", format: (value) => significant(1e3 * value) },
  { key: "trainings", title: "train\u00adings", format: significant, isShown: (row) => row.trainings > 1 },
  { key: "fit_seconds", title: "time, s", format: significant },
];

const metricHead = (metric) =>
  `${metric.title}${metric.isShare ? ", %" : ""}${metric.sign > 0 ? "" : " (lower is better)"}`;
const valueOf = (column, row) => (column.value ? column.value(row) : row[column.key]);

/** Order rows; what is missing comes last in both directions. */
function sortedRows(rows, { key, isDescending }) {
  const column = COLUMNS.find((one) => one.key === key);
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  return [...rows].sort((one, other) => {
    const [a, b] = [valueOf(column, one), valueOf(column, other)];
    if (a === null || b === null) return (a === null) - (b === null);
    return isDescending ? compare(b, a) : compare(a, b);
  });
}

function sortableHeader(column, sort, metric, onSort) {
  const isCurrent = column.key === sort.key;
  const direction = sort.isDescending ? "descending" : "ascending";
  const [mark, label] = isCurrent ? [sort.isDescending ? "\u25bc" : "\u25b2", `sorted ${direction}`] : ["\u25b4\u25be", "not sorted"];
  const button = element("button", { type: "button", onclick: () => onSort(column.key) }, column.title ?? metricHead(metric),
    element("span", { className: "sort", role: "img", "aria-label": label, title: label }, mark));
  return element("th", {
    scope: "col",
    className: `sortable ${column.format ? "number" : "corner"}`,
    "data-key": column.key,
    "aria-sort": isCurrent ? direction : "none",
  }, button);
}

/** Rows with the best mean of what was asked of them and of their bits, where there are several. */
function bestRows(rows, { sign }) {
  return new Set(rows.filter((row) => {
    const group = rows.filter(({ bits, ratio }) => bits === row.bits && ratio === row.ratio);
    return group.length > 1 && group.every((other) => sign * other.y <= sign * row.y);
  }));
}

function tableCell(column, row, metric, swatch, isBest) {
  const value = valueOf(column, row);
  if (!column.format) return element("th", { scope: "row" }, swatch(value), breakable(value));
  const className = isBest && column.key === "y" ? "number best" : "number";
  return element("td", { className }, value === null ? MISSING : column.format(value, row, metric));
}

function drawTable(rows, sort, metric, swatch, onSort) {
  const focused = document.activeElement?.closest("#table th")?.getAttribute("data-key");
  const columns = COLUMNS.filter(({ isShown }) => !isShown || rows.some(isShown));
  const head = columns.map((column) => sortableHeader(column, sort, metric, onSort));
  const best = bestRows(rows, metric);
  const body = sortedRows(rows, sort).map((row) =>
    element("tr", {}, ...columns.map((column) => tableCell(column, row, metric, swatch, best.has(row)))));
  byId("table").replaceChildren(
    element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...body),
  );
  head.find((cell) => cell.getAttribute("data-key") === focused)?.firstChild.focus();
}

/** Some screens show no scroll bar: a box says itself that its table goes on. */
const overflowWatch = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const box = target.closest(".scroll");
    box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
  }
});

function watchOverflow(box) {
  overflowWatch.observe(box);
  overflowWatch.observe(box.firstChild);
  return box;
}

function headRow(titles) {
  return element("thead", {}, element("tr", {}, ...titles.map((title, i) =>
    element("th", { scope: "col", className: i ? "" : "corner" }, title))));
}

function scrollBox(label, table) {
  return watchOverflow(element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": label }, table));
}

/** For each thing asked: the best mean, and what cannot be told from it. */
function bestTable(matrix, metric, swatch, isShown) {
  const rows = matrix.cells.map((cell) => {
    const shown = cell.points.filter((point) => isShown(point.method));
    const names = cell.winners.filter((method) => isShown(method));
    const listed = names.map((name) => {
      const point = shown.find((one) => one.method === name);
      return element("div", {}, swatch(name), breakable(name), ` ${spread(metric, point.y, point.yStd)}`);
    });
    const isTied = cell.winners.length > 1;
    const hidden = cell.winners.length - names.length;
    if (hidden) listed.push(element("div", {}, `${hidden} hidden`));
    return element("tr", {},
      element("th", { scope: "row" }, cell.asked),
      element("td", {}, isTied ? `tie of ${cell.winners.length}` : "win", cell.isOneSeed ? ", one seed" : ""),
      element("td", {}, `${cell.separated.length} of ${cell.points.length - 1}`),
      element("td", { className: "long" }, ...listed));
  });
  const titles = ["asked", "outcome", "told apart", `best mean, ${metricHead(metric)}`];
  return element("table", { className: "best" }, headRow(titles), element("tbody", {}, ...rows));
}

function duelCell(duel, one, other) {
  if (one === other) return element("td", { className: "self", "aria-label": "itself" }, MISSING);
  if (!duel) return element("td", { className: "self" }, "no cell");
  const { wins, ties, losses } = duel;
  const outcome = wins > losses ? "ahead" : wins < losses ? "behind" : "even";
  const label = `${one} against ${other}: ${wins} won, ${ties} tied, ${losses} lost`;
  return element("td", { className: outcome, title: label, "aria-label": label }, `${wins} / ${ties} / ${losses}`);
}

function duelTable(matrix, swatch, isShown) {
  const shown = matrix.methods.filter((method) => isShown(method));
  const duels = new Map(matrix.duels.map((duel) => [JSON.stringify([duel.one, duel.other]), duel]));
  const rows = shown.map((one) => element("tr", {},
    element("th", { scope: "row" }, swatch(one), breakable(one)),
    ...shown.map((other) => duelCell(duels.get(JSON.stringify([one, other])), one, other))));
  const caption = element("caption", {}, "Row against column: won / tied / lost");
  return element("table", { className: "duels" }, caption, headRow(["", ...shown]), element("tbody", {}, ...rows));
}

function drawWins(setting, bits, swatch, isShown) {
  const matrix = setting.wins.find((one) => String(one.bits) === bits) ?? setting.wins[0];
  byId("wins").replaceChildren();
  if (!matrix) {
    byId("wins-note").textContent = "No two methods were asked for the same ratio or the same bytes.";
    return;
  }
  byId("wins-note").textContent =
    `Mean ${setting.metric.title} at ${matrix.bits} bits, wherever the same was asked of two methods. A tie: they differ by no more than ` +
    `${report.tieErrors} standard errors of the difference, from the spread of the seeds, and the test does not tell them apart; with one seed each, only equal ` +
    "values tie. Of two equally good methods with three seeds each, one still wins in about every eighth cell. " +
    "Told apart: the other methods that paired t-tests over seeds tell from the best at 5 %, after Holm's correction in each cell. With three seeds they " +
    "see little (a single test takes a difference of 4.3 standard errors, the first of twelve 15.4): what they do not tell apart is not shown to be equal. Equal ratios are equal numbers of learned values, not of bytes: indices come on top.";
  byId("wins").append(
    scrollBox("Best method of each ratio", bestTable(matrix, setting.metric, swatch, isShown)),
    element("h3", {}, "Method against method"),
    scrollBox("Method against method", duelTable(matrix, swatch, isShown)),
  );
}

function drawProblems() {
  const { problems } = report;
  byId("problems-note").textContent = problems.length
    ? `${plural(problems.length, "folder")} failed, missing, or not as expected:`
    : "None: every run that was found is in the picture.";
  const box = byId("problem-list");
  box.parentElement.hidden = !problems.length;
  const rows = problems.map(({ folder, reason }) => element("tr", {},
    element("td", { className: "long" }, element("code", {}, folder)),
    element("td", { className: "long" }, reason)));
  box.replaceChildren(headRow(["folder", "reason"]), element("tbody", {}, ...rows));
}

function drawRecipe(setting) {
  const entries = setting.recipe.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]);
  byId("recipe").replaceChildren(element("dl", {}, ...entries));
}

function drawProvenance() {
  const numRuns = (value) => (value.runs === 1 ? "1 run" : `${integer(value.runs)} runs`);
  const entries = report.environments.flatMap(({ name, values }) => [
    element("dt", {}, name.replaceAll("_", " ")),
    ...values.map((value) => element("dd", {}, values.length > 1 ? `${value.text} (${numRuns(value)})` : value.text)),
  ]);
  for (const entry of entries) if (entry.tagName === "DD") entry.style.gridColumn = "2";
  byId("environment").replaceChildren(element("dl", {}, ...entries));
  const rows = report.commands.map(([folder, command]) => element("tr", {},
    element("td", { className: "long" }, element("code", {}, folder)),
    element("td", { className: "long" }, element("code", {}, command || MISSING))));
  byId("commands").replaceChildren(headRow(["folder", "command"]), element("tbody", {}, ...rows));
}
