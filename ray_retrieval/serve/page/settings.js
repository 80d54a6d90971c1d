// Filter, re-ranking, and what to compare with.

import { $, h, words } from "./dom.js";
import { FIRST, go, read } from "./state.js";

const MOST_LABELS = 1000; // in a list to choose from; beyond it the filter field is the way

const wide = matchMedia("(min-width: 62rem)");
let opened = false;
let usual; // the re-ranking of the shown index where none is asked for

const quoted = (text) => `"${text.replaceAll('"', '""')}"`;

export function whereOf({ label, where }) {
  const parts = [
    label !== undefined && `label = ${quoted(label)}`,
    where && (label === undefined ? where : `(${where})`),
  ];
  return parts.filter(Boolean).join(" and ") || undefined;
}

const defaultOf = (index) => index.rerankings.find((one) => one.is_default)?.name;
const indexOf = (served, name) => served.indexes.find((one) => one.name === name);
const titleOf = (index, rerank) =>
  index.rerankings.length > 1 ? `${index.name} · ${rerank === "none" ? "no re-ranking" : rerank}` : index.name;

// The one or two searches that a state asks for: { index, rerank, asked, title }. What nobody has chosen is not
// asked for: then the server does without the re-ranking that it would use where that cannot be.
export function settingsOf(state, served, index) {
  const setting = (of, chosen) => {
    const known = of.rerankings.some(({ name }) => name === chosen);
    const asked = known && chosen !== defaultOf(of) ? chosen : undefined;
    const rerank = asked ?? defaultOf(of);
    return { index: of.name, rerank, asked, title: titleOf(of, rerank) };
  };
  const settings = [setting(index, state.rerank)];
  const other = state.with && indexOf(served, state.with);
  const beside = other && setting(other, state["with-rerank"]);
  // The same on both sides is one search.
  if (beside && (beside.index !== index.name || beside.rerank !== settings[0].rerank)) settings.push(beside);
  return settings;
}

const option = (value, text, chosen) => h("option", { value, selected: value === chosen }, text);

export function showSettings(state, served, index) {
  const searching = Boolean(state.id || state.upload);
  // Where there is room for it beside the hits it is open, until it is closed by hand.
  if (searching && !opened && wide.matches) $("settings").open = opened = true;
  $("settings").hidden = false;
  const names = index.class_names ?? [];
  const listed = names.length > MOST_LABELS ? [] : names;
  const label = state.label ?? "";
  // One that was chosen elsewhere can be seen and taken back here.
  $("label-choice").hidden = !listed.length && !label;
  $("label").replaceChildren(
    option("", "Any", label),
    ...(!label || listed.includes(label) ? [] : [option(label, label, label)]),
    ...listed.map((name) => option(name, name, label)),
  );
  $("where").value = state.where ?? "";
  const columns = Object.keys(index.columns);
  const example = Object.entries(index.columns).find(
    ([name, type]) => name !== "label" && name !== "row" && /int|float|double/.test(type),
  )?.[0];
  $("where").placeholder = example
    ? `${example} < 20`
    : names.length
      ? `label != ${names.reduce((least, name) => (name.length < least.length ? name : least))}`
      : "";
  $("where-hint").textContent = columns.length ? `Columns: ${words(columns)}.` : "";

  usual = defaultOf(index);
  const rerank = settingsOf(state, served, index)[0].rerank;
  $("rerank-choice").hidden = index.rerankings.length < 2 || !searching;
  $("rerank").replaceChildren(
    ...index.rerankings.map(({ name }) => option(name, name === "none" ? "None" : name, rerank)),
  );
  $("rerank-hint").textContent = $("rerank-choice").hidden
    ? ""
    : sentence(index.rerankings.find(({ name }) => name === rerank)?.description ?? "");

  const others = served.indexes
    .flatMap((of) => of.rerankings.map(({ name }) => ({ of, name })))
    .filter(({ of, name }) => of !== index || name !== rerank);
  $("compare-choice").hidden = !others.length || !searching;
  const beside = settingsOf(state, served, index)[1];
  const chosen = beside ? JSON.stringify([beside.index, beside.rerank]) : "";
  $("compare").replaceChildren(
    option("", "Nothing", chosen),
    ...others.map(({ of, name }) => option(JSON.stringify([of.name, name]), titleOf(of, name), chosen)),
  );
}

const sentence = (text) => (text ? `${text.charAt(0).toUpperCase()}${text.slice(1)}.` : "");

export function prepareSettings() {
  const change = (changes) => go({ ...read(), ...changes, k: FIRST }, { quiet: true });
  $("settings-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const where = $("where").value.trim() || undefined;
    if (where !== read().where) change({ where });
  });
  $("where").addEventListener("change", () => $("settings-form").requestSubmit());
  $("label").addEventListener("change", () => change({ label: $("label").value || undefined }));
  $("rerank").addEventListener("change", () => {
    const chosen = $("rerank").value;
    change({ rerank: chosen === usual ? undefined : chosen });
  });
  $("compare").addEventListener("change", () => {
    const [index, rerank] = $("compare").value ? JSON.parse($("compare").value) : [];
    change({ with: index, "with-rerank": rerank });
  });
}
