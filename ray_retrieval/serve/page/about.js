// The page about an index: what it holds, the model that made it and what was measured of it, and its map.

import { map } from "./api.js";
import { $, bytes, count, h, number, upper, words } from "./dom.js";
import { drawMap } from "./map.js";
import { address } from "./state.js";

export function showAbout(index, served, signal, focus) {
  const about = $("about");
  const mapped = h(
    "div",
    { class: "map", "aria-busy": "true" },
    h("p", { class: "quiet" }, "The map is being drawn. The first time it takes a while."),
  );
  about.replaceChildren(
    h(
      "div",
      { class: "heading" },
      h("h2", { tabindex: "-1", id: "about-title" }, index.name),
      h("span", { class: "quiet" }, describe(index)),
    ),
    figures(index),
    section("Map", mapped),
    h("div", { class: "halves" }, section("Shards", shards(index)), section("Versions", versions(index))),
    h(
      "div",
      { class: "halves" },
      section("Model", card(index.card, index.model)),
      section("What was measured", measured(index.card)),
    ),
    section("Searches", searches(index, served)),
  );
  if (focus) $("about-title").focus({ preventScroll: true });
  showMap(mapped, index, signal); // the page does not wait for it
}

// A map that is not ready yet is asked for again, for as long as somebody looks.
async function showMap(place, index, signal) {
  let asked = false;
  const again = () => {
    if (asked || signal.aborted || !place.isConnected) return;
    asked = true; // by the button or by the clock: a second map would undo where somebody has gone on the first
    showMap(place, index, signal);
  };
  let focused = false;
  try {
    const found = await map(index.name, signal);
    focused = place.contains(document.activeElement);
    if (found.spots.length)
      drawMap(place, found, (spot) => address({ index: index.name, id: spot.id, from: index.name }));
    else place.replaceChildren(h("p", { class: "quiet" }, "There is nothing to map: the index is empty."));
  } catch (error) {
    if (error.name === "AbortError") return;
    focused = place.contains(document.activeElement);
    place.replaceChildren(
      h("p", { class: "notice wrong" }, error.message),
      h("div", { class: "buttons" }, h("button", { type: "button", on: { click: again } }, "Try again")),
    );
    if (error.status === 503) setTimeout(again, 1000 * (error.retryAfter ?? 5));
  }
  place.setAttribute("aria-busy", "false");
  if (focused) place.querySelector("canvas, button")?.focus({ preventScroll: true });
}

function describe({ kind, bits, dimension }) {
  if (kind === "codes") return `codes of ${count(bits, "bit")}`;
  return kind === "vectors" ? `unit vectors of ${count(dimension, "number")}` : "sets of local features";
}

const section = (title, ...children) => h("section", { class: "panel" }, h("h3", {}, title), children);

function figures({ rows, deleted, shards, shard_groups: groups, version, memory }) {
  const figure = (value, text) => h("div", { class: "figure" }, h("dt", {}, text), h("dd", {}, value));
  return h(
    "dl",
    { class: "figures" },
    figure(number(rows), rows === 1 ? "image" : "images"),
    figure(number(version), "version"),
    figure(number(shards.length), `${shards.length === 1 ? "shard" : "shards"} in ${count(groups, "group")}`),
    figure(bytes((memory.mapped ?? 0) + (memory.private ?? 0)), "in memory"),
    memory.per_row ? figure(bytes(memory.per_row), "an image") : null,
    deleted ? figure(number(deleted), "removed, not yet compacted") : null,
  );
}

function shards({ shards, memory }) {
  const most = Math.max(1, ...shards.map(({ rows }) => rows));
  const bar = ({ rows }) => {
    const part = h("span", { class: "bar-part" });
    part.style.width = `${(100 * rows) / most}%`;
    return h("span", { class: "bar-room", "aria-hidden": "true" }, part);
  };
  const shown = shards.slice(0, 64);
  return [
    h(
      "div",
      { class: "scrolls", tabindex: 0, role: "region", "aria-label": "Shards" },
      h(
        "table",
        {},
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            ["Shard", "Images", "", "Size", "Group"].map((name) => (name ? h("th", { scope: "col" }, name) : h("td"))),
          ),
        ),
        h(
          "tbody",
          {},
          shown.map((shard, place) =>
            h(
              "tr",
              {},
              h("td", {}, String(place)),
              h("td", { class: "number" }, number(shard.rows)),
              h("td", {}, bar(shard)),
              h("td", { class: "number" }, bytes(shard.bytes ?? 0)),
              h("td", { class: "number" }, String(shard.group ?? 0)),
            ),
          ),
        ),
      ),
    ),
    h(
      "p",
      { class: "quiet" },
      `${shards.length > shown.length ? `And ${number(shards.length - shown.length)} more. ` : ""}${bytes(memory.mapped ?? 0)} are mapped from files, ${bytes(memory.private ?? 0)} are the server's own.`,
    ),
  ];
}

const versions = ({ versions, version }) =>
  h(
    "ol",
    { class: "versions" },
    versions.map(({ number: which, operation, rows }) =>
      h(
        "li",
        { class: which === version ? "now" : "" },
        h("strong", {}, `Version ${which}`),
        h("span", {}, operation),
        h("span", { class: "quiet" }, `${count(rows, "image")}${which === version ? " · served" : ""}`),
      ),
    ),
  );

const plain = (value) =>
  typeof value === "number" ? number(value, 6) : Array.isArray(value) ? value.map(plain).join(", ") : String(value);

function listed(value) {
  return h(
    "dl",
    { class: "facts" },
    Object.entries(value)
      .filter(([, one]) => one !== null && one !== "" && !(typeof one === "object" && !Object.keys(one).length))
      .flatMap(([name, one]) => [
        h("dt", {}, upper(name.replaceAll("_", " "))),
        h("dd", {}, typeof one === "object" && !Array.isArray(one) ? listed(one) : plain(one)),
      ]),
  );
}

function card(given, model) {
  const { measured: _, validation: __, fingerprint, ...rest } = given;
  return listed({ ...rest, fingerprint: fingerprint ?? model });
}

// Metrics of the test, each with its policy, and those by which the model was chosen.
function measured({ measured: test = [], validation = {} }) {
  const chosen = Object.entries(validation).map(([name, value]) => ({
    name: `${name} on the validation split`,
    value,
  }));
  const all = [...test, ...chosen];
  if (!all.length) return h("p", { class: "quiet" }, "Nothing that was measured lies beside this index.");
  return h(
    "dl",
    { class: "metrics" },
    all.map(({ name, value, policy }) =>
      h(
        "div",
        {},
        h("dt", {}, name),
        h("dd", { class: "value" }, typeof value === "number" ? value.toFixed(4) : plain(value)),
        policy ? h("dd", { class: "quiet" }, upper(policy)) : null,
      ),
    ),
  );
}

function searches({ metric, search, rerankings, columns, writable }, served) {
  const names = Object.entries(columns).map(([name, type]) => `${name} (${type})`);
  const list = rerankings.map(
    ({ name, description, is_default: first }) => `${name}${first ? " (default)" : ""}: ${description}`,
  );
  return listed({
    distance: metric,
    search,
    "re-ranking": list.join("; "),
    filter_by: words(names),
    uploads: `${words(served.formats)}, up to ${bytes(served.max_upload_bytes)} and ${number(served.max_pixels / 1e6, 1)} million pixels`,
    most_hits: number(served.max_k),
    changes: writable ? "images may be added and removed here" : "read only",
  });
}
