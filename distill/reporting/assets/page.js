// The page from top to bottom: headline, results, curves, responses, config.

const ROLES = ["base", "student", "teacher"];

function rolesOf(run) {
  const others = Object.keys(run.results).filter((role) => !ROLES.includes(role));
  return [...ROLES, ...others].filter((role) => run.results[role]);
}

function teachersOf(config) {
  const models = Object.entries(config).filter(([key]) => /^teachers\.[^.]+\.model$/.test(key));
  return models.map(([key, model]) => `${key.split(".")[1]}: ${model}`).join(", ");
}

function headline(runs) {
  const config = runs[0].config;
  const facts = runs.length > 1 ? [] : [
    ["divergence", config["distillation.hard_labels"] ? "hard labels" : config["distillation.kl_type"]],
    ["lambda", config["distillation.lambda_"]],
    ["steps", `${runs[0].step} of ${config["distillation.max_steps"] ?? "?"}`],
    ["batch", config["policy.train_global_batch_size"]],
    ["learning rate", config["policy.optimizer.learning_rate"]],
    ["student", config["policy.model_name"]],
    ["teacher", config["distillation.teacher_model_path"] || teachersOf(config)],
  ];
  return el("header", { class: "top" },
    el("p", { class: "kicker" }, runs.length > 1 ? "Distillation, runs compared" : "Distillation run"),
    el("h1", {}, runs.map((run) => run.name).join(" · ")),
    el("ul", { class: "facts" }, facts.filter(([, value]) => value !== undefined && value !== "")
      .map(([name, value]) => el("li", {}, el("span", {}, name), String(value)))),
    runs.flatMap((run) => run.notes.map((note) => el("p", { class: "note", role: "status" },
      runs.length > 1 ? `${run.name}: ${note}` : note))));
}

function tiles(run) {
  const { base, student, teacher } = run.results;
  if (!student) return null;
  const tile = (title, before, after, goal) => el("div", { class: "card tile" },
    el("span", { class: "title" }, title),
    el("span", { class: "big" }, before === null ? null : el("span", { class: "before" }, before, " → "), after),
    el("span", { class: "goal" }, goal));
  const has = (field) => student[field] !== null && student[field] !== undefined;
  const before = (field, show) => (base && base[field] !== undefined ? show(base[field]) : null);
  return el("div", { class: "tiles" },
    has("accuracy") ? tile("Held-out accuracy", before("accuracy", percent), percent(student.accuracy),
      teacher?.accuracy !== undefined ? `teacher ${percent(teacher.accuracy)}` : `${student.examples} prompts`) : null,
    has("forward_kl") ? tile("Forward KL", before("forward_kl", number), number(student.forward_kl),
      "KL(teacher ‖ student), nats per token") : null,
    has("reverse_kl") ? tile("Reverse KL", before("reverse_kl", number), number(student.reverse_kl),
      "KL(student ‖ teacher), nats per token") : null,
    tile("Mean response", before("mean_length", number), number(student.mean_length),
      `tokens; ${percent(student.truncated)} cut off`));
}

function results(runs) {
  const rows = runs.flatMap((run) => rolesOf(run).map(
    (role) => resultRow(run, role, run.results[role], runs.length > 1)));
  if (!rows.length) return null;
  const names = ["model", "accuracy", "95% interval", "forward KL", "reverse KL", "length", "cut off", "prompts"];
  if (runs.length > 1) names.unshift("run");
  return el("section", { id: "results" }, el("h2", {}, "Results"),
    runs.filter((run) => run.verdict).map((run) => el("p", { class: "verdict" },
      runs.length > 1 ? `${run.name}: ${run.verdict}` : run.verdict)),
    el("p", { class: "lead" }, "Greedy responses to held-out prompts; divergences to the teacher in nats per " +
      "token of the model's own responses, over the whole vocabulary."),
    el("div", { class: "card scroll" }, el("table", { class: "results" },
      el("thead", {}, el("tr", {}, names.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, rows))));
}

function resultRow(run, role, r, withRun) {
  const interval = r.accuracy === null || r.accuracy === undefined ? el("td", {}, "–") : intervalCell(r);
  return el("tr", { class: role }, withRun ? el("td", {}, run.name) : null,
    el("th", { scope: "row" }, role), el("td", { class: "n" }, percent(r.accuracy)), interval,
    [r.forward_kl, r.reverse_kl].map((v) => el("td", { class: "n" }, v === null || v === undefined ? "–" : v.toFixed(4))),
    el("td", { class: "n" }, number(r.mean_length)), el("td", { class: "n" }, percent(r.truncated)),
    el("td", { class: "n" }, r.examples));
}

function intervalCell(r) {
  return el("td", { class: "interval" },
    svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("line", { class: "rail", x1: 0, x2: 100, y1: 5, y2: 5 }),
      svg("rect", { x: 100 * r.accuracy_low, width: 100 * (r.accuracy_high - r.accuracy_low), y: 3, height: 4 }),
      svg("rect", { class: "point", x: 100 * r.accuracy - 0.5, width: 1, y: 0, height: 10 })),
    el("span", {}, `${percent(r.accuracy_low)} – ${percent(r.accuracy_high)}`));
}

function curves(charts, runs) {
  const drawn = charts.map((chart) => drawChart(chart, runs)).filter((chart) => chart);
  if (!drawn.length) return null;
  return el("section", { id: "curves" }, el("h2", {}, "Curves"), el("div", { class: "charts" }, drawn));
}

function explanation(shown, runs) {
  if (!shown.charts.length && !shown.tables.length) return null;
  const drawn = shown.charts.map((chart) => drawChart(chart, runs)).filter((chart) => chart);
  return el("section", { id: "explanation" }, el("h2", {}, "Both models on the student's own responses"),
    el("p", { class: "lead" }, "All greedy responses to held-out prompts of the last evaluation, read by both " +
      "models. A token's share of the loss is that of its divergence."),
    el("div", { class: "charts" }, drawn),
    shown.tables.flatMap((table) => [el("h3", {}, table.title), el("p", { class: "lead" }, table.caption),
      el("div", { class: "card scroll" }, dataTable(table.columns, table.rows))]));
}

function facts(title, runs, section) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run[section])))];
  if (!names.length) return null;
  const shown = (value) => (value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));
  const values = (name) => runs.map((run) => shown(run[section][name]));
  const differs = (name) => new Set(values(name)).size > 1;
  names.sort((a, b) => differs(b) - differs(a));
  const head = runs.length > 1
    ? el("thead", {}, el("tr", {}, el("th", {}, "key"), runs.map((run) => el("th", {}, run.name)))) : null;
  return el("details", { class: "card", open: runs.length > 1 && names.some(differs) },
    el("summary", {}, title), el("div", { class: "scroll" }, el("table", { class: "keys" }, head,
      el("tbody", {}, names.map((name) => el("tr", { class: differs(name) ? "differs" : "" },
        el("th", { scope: "row" }, name), values(name).map((value) => el("td", {}, value))))))));
}

function showPage(data) {
  const { runs, charts } = data;
  document.title = `${runs.map((run) => visible(run.name)).join(", ")} – distillation report`;
  document.getElementById("page").append(...[
    headline(runs), runs.length === 1 ? tiles(runs[0]) : null, results(runs), curves(charts, runs),
    explanation(data.explanation, runs), rolloutViewer(runs),
    el("section", { id: "setup" }, el("h2", {}, "Setup"), facts("Config", runs, "config"),
      facts("Environment", runs, "environment")),
  ].filter((part) => part));
}

showPage(JSON.parse(document.getElementById("data").textContent));
