// The hits of one search or of two beside each other, and what is shown in their place.

import { showPicture } from "./api.js";
import { $, count, h, milliseconds, nameOf, number, ordinal, upper } from "./dom.js";
import { markSmall, missing } from "./query.js";
import { address } from "./state.js";

const STAGES = {
  decode: "Decode",
  encode: "Encode",
  search: "Search",
  merge: "Merge",
  rerank: "Re-rank",
  records: "Records",
};

// One image as a link to the search by it. `hit` may be a record without a distance.
export function tile(hit, { to, onWhy, beside }) {
  const name = nameOf(hit);
  const said = hit.in_words ?? "";
  const image = missing(markSmall(h("img", { alt: "", loading: "lazy", decoding: "async" })));
  const link = h(
    "a",
    {
      class: "shot",
      href: to,
      "data-go": true,
      title: hit.id,
      "aria-label": `Search by ${name}${said && `, ${said}`}`,
    },
    h("span", { class: "picture" }, image),
  );
  showPicture(image, hit.image);
  if (hit.similarity !== undefined) {
    const meter = h("span", { class: "meter", "aria-hidden": "true" }, h("span"));
    meter.firstChild.style.width = `${100 * Math.min(1, Math.max(0, hit.similarity))}%`;
    link.append(meter);
  }
  const caption = h(
    "div",
    { class: "caption" },
    h("span", { class: "name" }, name),
    said && h("span", { class: "far" }, said),
  );
  if (beside !== undefined) {
    const words = beside === null ? "only here" : beside === hit.rank ? "same place" : `${ordinal(beside)} there`;
    caption.append(h("span", { class: `beside ${beside === null ? "alone" : ""}` }, words));
  }
  if (onWhy)
    caption.append(
      h(
        "button",
        { type: "button", class: "why", "aria-label": `Why ${name}, ${ordinal(hit.rank)}?`, on: { click: onWhy } },
        "Why?",
      ),
    );
  return h("li", { class: "tile" }, link, caption);
}

const grid = (tiles, attributes) => h("ol", { class: "grid", ...attributes }, tiles);

export function loading(columns) {
  $("results").setAttribute("aria-busy", "true");
  if ($("columns").querySelector(".tile")) return; // what is there stays, dimmed, until the new hits come
  $("notices").replaceChildren();
  $("results-title").textContent = "Searching";
  const blank = () =>
    h(
      "li",
      { class: "tile blank", "aria-hidden": "true" },
      h("span", { class: "picture" }),
      h("span", { class: "line" }),
    );
  const one = () => h("div", { class: "column" }, grid(Array.from({ length: columns > 1 ? 6 : 20 }, blank)));
  place(Array.from({ length: columns }, one));
}

function place(columns) {
  $("columns").classList.toggle("two", columns.length > 1);
  $("columns").replaceChildren(...columns);
}

const notice = (kind, text, ...buttons) =>
  h(
    "div",
    { class: `notice ${kind}` },
    h("p", {}, text),
    buttons.length ? h("div", { class: "buttons" }, buttons) : null,
  );
export const button = (text, click, kind = "") => h("button", { type: "button", class: kind, on: { click } }, text);

function clear(title) {
  $("results").setAttribute("aria-busy", "false");
  $("results-title").textContent = title;
  for (const part of ["results-facts", "notices", "ends"]) $(part).replaceChildren();
}

// A random selection to begin with.
export function showSample({ images }, { state, shuffle, rows, where, clearFilter, focus }) {
  const shuffled = document.activeElement?.id === "shuffle";
  clear(images.length ? "Or begin with one of these" : "");
  if (!images.length) {
    place([
      rows
        ? empty(
            "No image passes the filter",
            "Of all images of the index none fits it.",
            button("Clear the filter", clearFilter),
          )
        : empty("The index is empty", "Add images to it: ray-retrieval index add, or POST to /v1/indexes/…/images."),
    ]);
    return;
  }
  $("results-facts").append(h("button", { type: "button", id: "shuffle", on: { click: shuffle } }, "Shuffle"));
  if (shuffled) $("shuffle").focus();
  if (where) $("results-facts").prepend(h("span", { class: "quiet" }, "that pass the filter"));
  place([
    grid(
      images.map((image) => tile(image, { to: address(state(image)) })),
      { id: "hits" },
    ),
  ]);
  if (focus) keepFocus($("results-title"));
}

function empty(title, text, ...buttons) {
  return h(
    "div",
    { class: "empty" },
    h("p", { class: "empty-title" }, title),
    h("p", { class: "quiet" }, text),
    buttons.length ? h("div", { class: "buttons" }, buttons) : null,
  );
}

// Goes on here by keyboard, where what had the focus is gone.
function keepFocus(element) {
  if (document.activeElement === document.body) element?.focus({ preventScroll: true });
}

export function showError(message, focus, ...buttons) {
  clear("");
  $("results-title").textContent = "That did not work";
  place([]);
  $("notices").replaceChildren(
    h(
      "div",
      { class: "notice wrong", role: "alert" },
      h("p", {}, message),
      buttons.length ? h("div", { class: "buttons" }, buttons) : null,
    ),
  );
  if (focus) keepFocus($("notices").querySelector("button"));
}

// The server is away: the search waits for it.
export function showWaiting() {
  clear("Waiting for the server");
  place([
    empty("The server cannot be reached", "The search is made as soon as it answers again. Nothing is lost meanwhile."),
  ]);
}

function latency(timings) {
  const total = timings.total ?? 0;
  const bars = Object.entries(STAGES)
    .filter(([stage]) => timings[stage] !== undefined)
    .flatMap(([stage, name]) => {
      const bar = h("span", { class: "bar-part" });
      bar.style.width = `${Math.max(1, (100 * timings[stage]) / Math.max(total, 1e-9))}%`;
      return [
        h("dt", {}, name),
        h("dd", {}, h("span", { class: "bar-room", "aria-hidden": "true" }, bar), milliseconds(timings[stage])),
      ];
    });
  return h("details", { class: "latency" }, h("summary", {}, milliseconds(total)), h("dl", {}, bars));
}

function partialNotice({ groups, rows, of_rows: all }, again) {
  const which =
    groups.length === 1 ? `Group ${groups[0]} of the shards did` : `Groups ${groups.join(", ")} of the shards did`;
  return notice(
    "partial",
    `A part of the answer is missing. ${which} not answer: ${number(rows)} of ${count(all, "image")} were not searched.`,
    button("Search again", again),
  );
}

// `found`: for each column { setting, answer } or { setting, error }.
export function showHits(found, { rowsOf, linkTo, why, again, more, clearFilter, kept, focus }) {
  const two = found.length > 1;
  const answered = found.filter(({ answer }) => answer);
  const most = Math.max(0, ...answered.map(({ answer }) => answer.hits.length));
  clear(
    two
      ? "Side by side"
      : most === 1
        ? "The nearest image"
        : most
          ? `The ${number(most)} nearest images`
          : "Nothing found",
  );
  if (!two && answered.length) {
    const { answer, setting } = answered[0];
    $("results-facts").append(
      h("span", { class: "quiet" }, `of ${number(rowsOf(setting.index))}`),
      latency(answer.timings_ms),
    );
  }
  for (const { answer } of answered) {
    if (answer.partial) $("notices").append(partialNotice(answer.partial, again));
    for (const note of answer.hits.length ? answer.notes : []) $("notices").append(notice("", `${upper(note)}.`));
  }
  place(
    found.map(({ setting, answer, error }, side) => {
      const ranks =
        two && found[1 - side].answer ? new Map(found[1 - side].answer.hits.map((hit) => [hit.id, hit.rank])) : null;
      const head =
        two && h("div", { class: "column-head" }, h("h3", {}, setting.title), answer && latency(answer.timings_ms));
      if (error)
        return h("div", { class: "column" }, head, notice("wrong", error.message, button("Try again", again)));
      if (!answer.hits.length) {
        const text = answer.notes.map((note) => `${upper(note)}.`).join(" ") || "The index has no image that is near.";
        return h(
          "div",
          { class: "column" },
          head,
          empty(
            text,
            answer.query.where ? "Loosen the filter, or search by another image." : "Search by another image.",
            answer.query.where && button("Clear the filter", clearFilter),
          ),
        );
      }
      const tiles = answer.hits.map((hit) =>
        tile(hit, {
          to: linkTo(hit, setting),
          onWhy: () => why(answer, hit, setting),
          beside: ranks ? (ranks.get(hit.id) ?? null) : undefined,
        }),
      );
      return h("div", { class: "column" }, head, grid(tiles, side ? {} : { id: "hits" }));
    }),
  );
  if (more) $("ends").append(h("button", { type: "button", id: "more", on: { click: more } }, "Show more"));
  // After "Show more" the keyboard goes on at the first new hit; after a new search, at the results.
  const next = kept && $("hits")?.children[kept]?.querySelector("a");
  if (focus) (next || $("results-title")).focus({ preventScroll: true });
}
