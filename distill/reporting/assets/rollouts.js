// The responses, token by token: a list to choose from, and the response that was chosen.

const FILTERS = [["all", "All"], ["wrong", "Wrong"], ["right", "Right"]];

// What a token is coloured by: the divergence; without a teacher, the student's surprise.
function strengths(record, response) {
  return record.has_teacher ? response.divergence : response.log_q.map((v) => (v === null ? null : -v));
}

function mean(values) {
  const known = values.filter((v) => v !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}

// The value that has full colour, the same for all responses that are coloured by the same thing.
function fullColour(records) {
  const all = records.flatMap(
    (record) => record.responses.flatMap((response) => strengths(record, response)));
  const known = all.filter((v) => v !== null).sort((a, b) => a - b);
  return Math.max(0.1, known[Math.floor(0.995 * (known.length - 1))] ?? 0);
}

function rolloutViewer(runs) {
  const sources = runs.flatMap((run) => ["student", "base"].filter((role) => run.rollouts[role])
    .map((role) => ({
      record: run.rollouts[role],
      label: (runs.length > 1 ? `${run.name} · ` : "") +
        (role === "base" ? "Base" : `Student, step ${run.rollouts[role].step}`),
    })));
  if (!sources.length) return null;
  const full = new Map([true, false].map((hasTeacher) => [hasTeacher, fullColour(
    sources.map((s) => s.record).filter((r) => r.has_teacher === hasTeacher))]));
  const colour = (v) => (v === null
    ? 0 : Math.sqrt(Math.min(1, Math.max(0, v) / full.get(record().has_teacher))));
  const state = { source: 0, filter: "all", order: "data", chosen: null, token: -1 };
  const list = el("div", { class: "list", role: "listbox", "aria-label": "Responses", tabindex: 0 });
  const detail = el("div", { class: "detail" });
  const count = el("span", { class: "count", role: "status" });
  const lead = el("p", { class: "lead" }), legend = el("div", { class: "heat-legend" });
  const tip = tooltip();

  const record = () => sources[state.source].record;
  const place = (response) => record().responses.indexOf(response);
  const passes = (a) => state.filter === "all" || a.correct === (state.filter === "right");

  function responses() {
    const shown = record().responses.filter(passes);
    if (state.order === "divergence") {
      const size = new Map(shown.map((a) => [a, mean(strengths(record(), a))]));
      shown.sort((a, b) => size.get(b) - size.get(a));
    }
    return shown;
  }

  function showList() {
    lead.textContent = introduction(record());
    legend.replaceChildren(...scaleOf(record(), full.get(record().has_teacher)));
    const shown = responses();
    if (!shown.some((a) => place(a) === state.chosen)) state.chosen = place(shown[0]);
    list.replaceChildren(...shown.map(listItem));
    const more = record().responses_in_all - record().responses.length;
    count.textContent = `${shown.length} of ${record().responses.length} responses` +
      (more > 0 ? `; the run gave ${more} more, which were only counted` : "");
    showResponse();
  }

  function listItem(response, i) {
    const values = strengths(record(), response);
    const isChosen = place(response) === state.chosen;
    if (isChosen) list.setAttribute("aria-activedescendant", `response-${i}`);
    const item = el("div", {
      id: `response-${i}`, role: "option", class: "item", "aria-selected": String(isChosen),
      onclick: () => { state.chosen = place(response); showList(); },
    }, mark(response), el("span", { class: "snippet" }, response.question.trim().slice(0, 200)),
    el("span", { class: "value" }, number(mean(values))), heatStrip(values.map(colour)));
    return item;
  }

  function showResponse() {
    tip.hide();
    state.token = -1;
    const response = record().responses[state.chosen];
    if (!response || !passes(response)) {
      detail.replaceChildren(el("p", { class: "empty" }, "There is no such response."));
      return;
    }
    detail.replaceChildren(...responseView(response));
  }

  function responseView(response) {
    const values = strengths(record(), response);
    const verdict = response.correct === null ? "not graded" : response.correct ? "right" : "wrong";
    const tokens = el("div", {
      class: "tokens", role: "listbox", "aria-orientation": "horizontal",
      "aria-label": "Response, token by token",
    }, response.tokens.map((text, i) => tokenView(response, text, i, colour(values[i]))));
    tokens.addEventListener("keydown", (event) => moveToken(event, tokens, values));
    tokens.firstChild?.setAttribute("tabindex", 0);
    return [
      el("header", {}, mark(response), el("b", {}, verdict),
        response.expected === null ? null : el("span", {}, "expected ", el("code", {}, response.expected)),
        el("span", {}, `${response.tokens.length} tokens` + (response.stopped ? "" : ", cut off")),
        el("span", {}, `mean ${number(mean(values))} nats`),
        el("span", { class: "id" }, response.id)),
      el("h4", {}, "Prompt"), el("div", { class: "prompt" }, lines(response.prompt)),
      el("h4", {}, "Response"), tokens];
  }

  function tokenView(response, text, i, strength) {
    const top = response.top?.[i];
    const differs = top && top[0][0] !== response.ids[i];
    const token = el("span", {
      class: differs ? "token differs" : "token", role: "option", tabindex: -1,
      "aria-label": `${visible(text) || "part of a character"}, ` +
        `${number(strengths(record(), response)[i])} nats`,
      onpointerenter: () => tip.show(token, tokenCard(record(), response, i)),
      onpointerleave: () => tip.hide(),
      onfocus: () => {
        // Leaving and coming back by Tab returns here.
        for (const other of token.parentElement.children) other.tabIndex = other === token ? 0 : -1;
        state.token = i;
        tip.show(token, tokenCard(record(), response, i));
      },
      onblur: () => tip.hide(),
    }, text === "" ? "·" : lines(text));
    token.style.setProperty("--heat", strength.toFixed(3));
    return token;
  }

  function moveToken(event, tokens, values) {
    const lastToken = values.length - 1;
    const hot = (i) => colour(values[i]) > 0.5;
    const next = values.findIndex((_, i) => i > state.token && hot(i));
    const to = {
      ArrowRight: state.token + 1, ArrowLeft: state.token - 1, Home: 0, End: lastToken,
      n: next < 0 ? values.findIndex((_, i) => hot(i)) : next,
    }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (to >= 0) tokens.children[Math.min(lastToken, to)]?.focus();
  }

  function moveResponse(by) {
    const shown = responses();
    const at = shown.findIndex((a) => place(a) === state.chosen);
    state.chosen = place(shown[Math.min(shown.length - 1, Math.max(0, at + by))]);
    showList();
    list.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" });
  }

  const source = choice("Model", sources.map((s, i) => [i, s.label]), 0,
    (i) => { state.source = Number(i); showList(); });
  const filter = choice("Filter", FILTERS, "all", (value) => { state.filter = value; showList(); });
  const order = choice("Order", [["data", "Data order"], ["divergence", "Largest first"]], "data",
    (value) => { state.order = value; showList(); });

  function shortcut(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { j: 1, k: -1 }[event.key] ??
      (event.target === list ? { ArrowDown: 1, ArrowUp: -1 }[event.key] : undefined);
    const tokens = detail.querySelector(".tokens");
    if (by) moveResponse(by);
    else if (event.key === "n" && tokens) {
      moveToken(event, tokens, strengths(record(), record().responses[state.chosen]));
    }
    else if (event.key === "f") {
      const values = FILTERS.map(([value]) => value);
      state.filter = values[(values.indexOf(state.filter) + 1) % values.length];
      filter.show(state.filter);
      showList();
    } else if (event.key === "b") {
      state.source = (state.source + 1) % sources.length;
      source.show(state.source);
      showList();
    } else if (event.key === "Escape") tip.hide();
    else return;
    event.preventDefault();
  }

  const section = el("section", { id: "rollouts" },
    el("h2", {}, "Responses, token by token"), lead,
    el("div", { class: "toolbar" }, source.group, filter.group, order.group, legend),
    el("div", { class: "card viewer" }, el("div", { class: "side" }, list, count), detail),
    el("p", { class: "keys" }, "Keys: ", keys("j", "k"), " responses, ", keys("←", "→"), " tokens, ",
      keys("n"), " next divergent token, ", keys("f"), " filter, ", keys("b"), " other model"), tip.card);
  document.addEventListener("keydown", shortcut);
  showList();
  return section;
}

function introduction(record) {
  return record.has_teacher
    ? "The first held-out prompts with the model's greedy responses. Each token is coloured by the " +
      "divergence of student and teacher where it was chosen; underlined is what the teacher would " +
      "not have chosen. Point at a token, or step to it, to see what the teacher would have said."
    : "The first held-out prompts with the model's greedy responses, coloured by the model's own " +
      "surprise (minus log-probability): the teacher of this run, if there is one, is behind a " +
      "server, and what it says of these tokens is not known here.";
}

function scaleOf(record, full) {
  const scale = el("span", { class: "scale", "aria-hidden": "true" });
  return ["0", scale, `${number(full)} nats of ${record.has_teacher ? "divergence" : "surprise"}`];
}

function keys(...names) {
  return names.map((name) => el("kbd", {}, name));
}

function mark(response) {
  const [sign, name] = response.correct === null ? ["–", "none"] : response.correct ? ["✓", "right"] : ["✗", "wrong"];
  return el("span", { class: `mark ${name}`, "aria-label": name === "none" ? "not graded" : name }, sign);
}

// Text whose ends of lines are to be seen.
function lines(text) {
  const parts = text.split("\n");
  return parts.flatMap((part, i) => (i ? [el("span", { class: "newline" }, "⏎"), "\n", part] : [part]));
}

function heatStrip(strengths) {
  const width = Math.max(1, strengths.length);
  return svg("svg", {
    class: "strip", viewBox: `0 0 ${width} 1`, preserveAspectRatio: "none", "aria-hidden": "true",
  }, strengths.map((s, i) => svg("rect", { x: i, width: 1, height: 1, "fill-opacity": s.toFixed(2) })));
}

function tokenCard(record, response, i) {
  const heading = el("div", { class: "heading" },
    el("code", {}, shownToken(response.tokens[i])),
    el("span", {}, record.has_teacher
      ? `divergence ${number(response.divergence[i])} nats` : `surprise ${number(-response.log_q[i])} nats`));
  const row = (text, logP, logQ, isChosen) => el("tr", { class: isChosen ? "chosen" : "" },
    el("th", { scope: "row" }, el("code", {}, shownToken(text)), isChosen ? " ← response" : ""),
    record.has_teacher ? bar("teacher", logP) : null, bar("student", logQ));
  const top = response.top?.[i] ?? [];
  const texts = top.map(([id]) => record.texts[id] ?? "");
  const chosenAt = top.findIndex(([id]) => id === response.ids[i]);
  const rows = top.map(([, logP, logQ], k) => row(texts[k], logP, logQ, k === chosenAt));
  if (chosenAt < 0) rows.push(row(response.tokens[i], response.log_p?.[i], response.log_q[i], true));
  const head = el("tr", {}, el("th", {}, record.has_teacher ? "teacher's choices" : "token"),
    record.has_teacher ? el("th", {}, "teacher") : null, el("th", {}, "model"));
  return [heading, el("table", {}, el("thead", {}, head), el("tbody", {}, rows))];
}

function shownToken(text) {
  return text === "" ? "(part of a character)" : text.replaceAll("\n", "⏎").replaceAll(" ", "␣");
}

function bar(name, logProbability) {
  const share = logProbability === null || logProbability === undefined ? 0 : Math.exp(logProbability);
  const cell = el("td", { class: `bar ${name}` }, el("i"), el("span", {}, probability(logProbability)));
  cell.style.setProperty("--share", share.toFixed(4));
  return cell;
}

function tooltip() {
  const card = el("div", { id: "tip", role: "tooltip", hidden: true });
  let owner = null;
  return {
    card,
    show(token, content) {
      this.hide();
      owner = token;
      token.setAttribute("aria-describedby", "tip");
      card.replaceChildren(...content);
      card.hidden = false;
      const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
      const { offsetWidth: width, offsetHeight: height } = card;
      const isBelow = at.bottom + height + 12 < innerHeight || at.top < height + 12;
      card.style.left = `${Math.max(8, Math.min(innerWidth - width - 8, at.left - 12))}px`;
      card.style.top = `${isBelow ? at.bottom + 8 : at.top - height - 8}px`;
    },
    hide() {
      card.hidden = true;
      owner?.removeAttribute("aria-describedby");
    },
  };
}
