// Why an image was found: the bits that differ, the angle between two vectors, or what two photographs share.

import { key, match, openPicture, originalAddress, pictureAddress, relative, release, thumbnailAddress } from "./api.js";
import { $, closer, count, h, nameOf, number, open, ordinal, svg, upper, words } from "./dom.js";
import { FIRST, go, kept, read } from "./state.js";

let looking = null; // AbortController of what the dialog shows

// { answer, hit, setting, kind, state, linkTo, explain, example }
export async function showWhy(given) {
  const { answer, hit, setting, linkTo } = given;
  const dialog = $("why");
  looking?.abort();
  const { signal } = (looking = new AbortController());
  dialog.addEventListener("close", () => looking.abort(), { signal });
  const place = answer.hits.indexOf(hit);
  const drawn = h("div", { class: "drawn", "aria-busy": "true" });
  const step = (by, text, name) => {
    const next = answer.hits[place + by];
    return h(
      "button",
      {
        type: "button",
        disabled: !next,
        id: `why-${name}`,
        "aria-label": text,
        on: { click: () => showWhy({ ...given, hit: next }) },
      },
      name === "next" ? "→" : "←",
    );
  };
  const had = document.activeElement?.id;
  open(
    dialog,
    h(
      "div",
      { class: "dialog-head" },
      h(
        "div",
        { class: "titles" },
        h("h2", { id: "why-title" }, `Why ${nameOf(hit)} is ${hit.rank === 1 ? "first" : ordinal(hit.rank)}`),
        h("p", { class: "quiet" }, upper(hit.in_words)),
      ),
      h("div", { class: "buttons" }, step(-1, "The one before", "before"), step(1, "The next one", "next")),
      closer(dialog),
    ),
    drawn,
    facts(hit),
    h(
      "div",
      { class: "dialog-foot buttons" },
      h("a", { class: "button primary", href: linkTo(hit, setting), "data-go": true }, "Search by this image"),
      typeof hit.class_name === "string"
        ? h(
            "button",
            { type: "button", on: { click: () => onlyLabel(dialog, hit.class_name) } },
            `Only ${hit.class_name}`,
          )
        : null,
      h(
        "a",
        {
          class: "button",
          href: relative(hit.original),
          target: "_blank",
          rel: "noopener",
          on: { click: (event) => openOriginal(event, hit, drawn) },
        },
        "Open the original",
      ),
    ),
  );
  if (had?.startsWith("why-")) ($(had).disabled ? dialog.querySelector(".close") : $(had)).focus();
  try {
    drawn.replaceChildren(...(await explained({ ...given, signal })));
  } catch (error) {
    if (signal.aborted) return;
    drawn.replaceChildren(h("p", { class: "notice wrong" }, error.message));
  }
  drawn.setAttribute("aria-busy", "false");
}

function openOriginal(event, hit, place) {
  if (!key.get()) return;
  event.preventDefault();
  openPicture(hit.original).catch((error) => place.prepend(h("p", { class: "notice wrong" }, error.message)));
}

function onlyLabel(dialog, label) {
  dialog.close();
  go({ ...read(), label, k: FIRST });
}

function facts(hit) {
  const known = [
    ["Id", hit.id],
    ["Label", words(hit.class_name) || words(hit.label)],
    ["Distance", number(hit.distance, 4)],
    ["Similarity", number(hit.similarity, 4)],
    ["Score after re-ranking", hit.score === null ? null : number(hit.score, 4)],
    ["Row", String(hit.row)],
    ...Object.entries(hit.columns ?? {}).map(([name, value]) => [name, words(value)]),
  ];
  return h(
    "dl",
    { class: "facts" },
    known
      .filter(([, value]) => value !== null && value !== undefined && value !== "")
      .flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]),
  );
}

async function explained(given) {
  const { hit, kind, explain } = given;
  // Vectors may be re-ranked by the local features of another model.
  if (kind === "vectors" && !hit.inliers) return angle(hit.similarity);
  const asked = (await explain()).hits.find(({ id }) => id === hit.id);
  const why = asked?.why;
  if (kind === "codes") return why?.bits ? bitsOf(why) : [h("p", {}, "The server does not say which bits differ.")];
  if (kind === "vectors" && !why?.query_points) return angle(hit.similarity);
  const pair = why?.query_points
    ? { points: [why.query_points, why.points], sizes: [why.query_size, why.size] }
    : await matched(given);
  return photographs(given, pair);
}

async function matched({ hit, setting, state, example }) {
  return match({ example: await example(), box: state.box, id: hit.id, index: setting.index });
}

// Codes: one cell a bit, sixteen in a row; the hit's bits that are not the query's stand out.

function bits(hex, many) {
  return Array.from({ length: many }, (_, bit) => (parseInt(hex[bit >> 2], 16) >> (3 - (bit % 4))) & 1);
}

function bitsOf({ bits: many, differing, query_code: query, code }) {
  const wrong = new Set(differing);
  const across = many > 128 ? 32 : 16;
  const cell = 10;
  const drawing = (hex, marks) =>
    svg(
      "svg",
      {
        viewBox: `-1 -1 ${across * cell + 1} ${Math.ceil(many / across) * cell + 1}`,
        class: "bits",
        "aria-hidden": "true",
      },
      bits(hex, many).map((bit, place) =>
        svg("rect", {
          x: (place % across) * cell,
          y: Math.floor(place / across) * cell,
          width: cell - 2,
          height: cell - 2,
          rx: 1.5,
          class: `${bit ? "one" : "zero"}${marks && wrong.has(place) ? " differs" : ""}`,
        }),
      ),
    );
  const few = differing.length <= 24;
  return [
    h(
      "div",
      { class: "pair" },
      h("figure", {}, drawing(query, false), h("figcaption", {}, "The query's code")),
      h("figure", {}, drawing(code, true), h("figcaption", {}, "This image's code")),
    ),
    h(
      "p",
      {},
      differing.length
        ? `${number(differing.length)} of ${count(many, "bit")} ${differing.length === 1 ? "differs" : "differ"}, outlined in this image's code${few ? `: ${differing.join(", ")}, counted from 0` : ""}.`
        : `All ${many} bits are the same.`,
    ),
  ];
}

// Vectors: their numbers mean nothing one by one, the angle between them does.

function angle(cosine) {
  const turn = Math.acos(Math.min(1, Math.max(-1, cosine)));
  const at = (radius, by) => [110 + radius * Math.cos(by), 112 - radius * Math.sin(by)];
  const arrow = (by, kind) => {
    const [x, y] = at(96, by);
    const wings = [2.85, -2.85].map((side) => [x + 9 * Math.cos(by + side), y - 9 * Math.sin(by + side)].join(" "));
    return svg("path", { d: `M110 112L${x} ${y}M${wings[0]}L${x} ${y}L${wings[1]}`, class: kind });
  };
  const [x, y] = at(40, turn);
  const drawing = svg(
    "svg",
    { viewBox: "0 0 220 122", class: "angle", "aria-hidden": "true" },
    svg("path", { d: `M150 112A40 40 0 0 0 ${x} ${y}`, class: "arc" }),
    arrow(0, "ours"),
    arrow(turn, "theirs"),
  );
  const degrees = number((turn * 180) / Math.PI, 1);
  return [
    h(
      "figure",
      { class: "single" },
      drawing,
      h("figcaption", {}, `The query's vector and this image's meet at ${degrees}°`),
    ),
    h("p", {}, `The cosine of that angle is ${number(cosine, 3)}: 1 is the same direction, 0 has nothing in common.`),
  ];
}

// Local features: both photographs with a line between the points that agree on where things are.

async function photographs({ hit, setting, state, signal }, { points: [ours, theirs], sizes }) {
  const held = (source) => {
    if (signal.aborted) release(source);
    else signal.addEventListener("abort", () => release(source));
    return source;
  };
  const upload = state.upload && (await kept(state.upload));
  const ofQuery = upload ? URL.createObjectURL(upload.blob) : pictureAddress(originalAddress(state.from, state.id));
  const query = held(await ofQuery);
  const found = held(await pictureAddress(originalAddress(setting.index, hit.id)));
  signal.throwIfAborted(); // then both are released: nothing may ask for them any more
  if (!ours?.length) {
    const small = (source, alt) => h("figure", {}, h("img", { src: source, alt: "" }), h("figcaption", {}, alt));
    const thumbnail = held(await pictureAddress(`${thumbnailAddress(setting.index, hit.id)}&size=512`));
    signal.throwIfAborted();
    return [
      h("div", { class: "pair" }, small(query, "The query"), small(thumbnail, "This image")),
      h("p", {}, "No points of the two images agree on where things are."),
    ];
  }
  return [
    drawMatches([query, found], [ours, theirs], sizes),
    h(
      "p",
      {},
      `${count(ours.length, "point")} of the query ${ours.length === 1 ? "lies" : "lie"} where ${ours.length === 1 ? "its" : "their"} counterpart in this image should be. Point at a line, or step through them with the arrow keys.`,
    ),
  ];
}

function drawMatches(pictures, points, sizes) {
  const stacked = innerWidth < 620;
  const side = 500; // of both pictures, in units of the drawing: equal heights, or stacked equal widths
  const scales = sizes.map(([width, height]) => side / (stacked ? width : height));
  const shown = sizes.map(([width, height], number_) => [width * scales[number_], height * scales[number_]]);
  const gap = 16;
  const starts = stacked
    ? [
        [0, 0],
        [0, shown[0][1] + gap],
      ]
    : [
        [0, 0],
        [shown[0][0] + gap, 0],
      ];
  const room = stacked ? [side, shown[0][1] + gap + shown[1][1]] : [shown[0][0] + gap + shown[1][0], side];
  const unit = room[0] / (stacked ? 340 : 800);
  const at = (which, [x, y]) => [
    starts[which][0] + (x + 0.5) * scales[which],
    starts[which][1] + (y + 0.5) * scales[which],
  ];
  const lines = points[0].map((point, line) => {
    const [x1, y1] = at(0, point);
    const [x2, y2] = at(1, points[1][line]);
    return svg(
      "g",
      { class: "match" },
      svg("line", { x1, y1, x2, y2, class: "under", "stroke-width": 3.2 * unit }),
      svg("line", { x1, y1, x2, y2, class: "over", "stroke-width": 1.3 * unit }),
      svg("circle", { cx: x1, cy: y1, r: 3 * unit, "stroke-width": unit }),
      svg("circle", { cx: x2, cy: y2, r: 3 * unit, "stroke-width": unit }),
    );
  });
  const drawing = svg(
    "svg",
    {
      viewBox: `0 0 ${room[0]} ${room[1]}`,
      class: "matches",
      role: "img",
      tabindex: 0,
      "aria-label": `${count(lines.length, "inlier")} between the query and this image`,
    },
    pictures.map((href, which) =>
      svg("image", { href, x: starts[which][0], y: starts[which][1], width: shown[which][0], height: shown[which][1] }),
    ),
    lines,
  );
  let lit = -1;
  const light = (line) => {
    lines[lit]?.classList.remove("lit");
    lit = line;
    drawing.classList.toggle("one", lit >= 0);
    if (lit >= 0) {
      lines[lit].classList.add("lit");
      lines[lit].parentNode.append(lines[lit]); // above the others
    }
  };
  lines.forEach((group, line) => group.addEventListener("pointerenter", () => light(line)));
  drawing.addEventListener("pointerleave", () => light(-1));
  drawing.addEventListener("blur", () => light(-1));
  drawing.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    light((lit + by + (lit < 0 && by < 0 ? 1 : 0) + lines.length) % lines.length);
  });
  return drawing;
}
