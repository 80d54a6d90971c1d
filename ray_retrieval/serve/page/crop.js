// Chooses a region of an image, by pointer or by keyboard.

import { $, closer, h, open } from "./dom.js";

const LEAST = 4; // pixels of the image, the least side of a region
const CORNERS = { nw: "Top left corner", ne: "Top right corner", sw: "Bottom left corner", se: "Bottom right corner" };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// The region as [left, top, right, bottom] in pixels of the image; null: the whole; undefined: left as it was.
export function crop(image, given) {
  const dialog = $("cropping");
  const region = h("button", {
    type: "button",
    class: "region",
    "aria-label": "Region: arrow keys move it, with Shift they change its size",
  });
  const corners = Object.entries(CORNERS).map(([name, label]) =>
    h("button", {
      type: "button",
      class: `corner ${name}`,
      "data-corner": name,
      "aria-label": `${label}: arrow keys move it`,
    }),
  );
  const stage = h("div", { class: "stage" }, image, region, corners);
  const told = h("p", { class: "quiet", role: "status" }, "The image is on its way.");
  const use = h("button", { type: "button", class: "primary", disabled: true }, "Search this region");
  const whole = h("button", { type: "button" }, "Whole image");
  image.alt = "";
  image.draggable = false;
  let box = null;

  const size = () => [image.naturalWidth, image.naturalHeight];
  const scale = () => image.clientWidth / image.naturalWidth;

  function draw() {
    const [left, top, right, bottom] = box;
    const at = { left, top, width: right - left, height: bottom - top };
    for (const [side, value] of Object.entries(at)) region.style[side] = `${value * scale()}px`;
    for (const corner of corners) {
      const name = corner.dataset.corner;
      corner.style.left = `${(name.includes("w") ? left : right) * scale()}px`;
      corner.style.top = `${(name.includes("n") ? top : bottom) * scale()}px`;
    }
    told.textContent = `${Math.round(right - left)} × ${Math.round(bottom - top)} pixels from ${Math.round(left)}, ${Math.round(top)}`;
  }

  function put([left, top, right, bottom]) {
    const [width, height] = size();
    box = [clamp(left, 0, width), clamp(top, 0, height), clamp(right, 0, width), clamp(bottom, 0, height)];
    draw();
  }

  function move(x, y) {
    const [width, height] = size();
    const [left, top, right, bottom] = box;
    const dx = clamp(x, -left, width - right);
    const dy = clamp(y, -top, height - bottom);
    put([left + dx, top + dy, right + dx, bottom + dy]);
  }

  function stretch(corner, x, y) {
    let [left, top, right, bottom] = box;
    if (corner.includes("w")) left = clamp(left + x, 0, right - LEAST);
    else right = clamp(right + x, left + LEAST, size()[0]);
    if (corner.includes("n")) top = clamp(top + y, 0, bottom - LEAST);
    else bottom = clamp(bottom + y, top + LEAST, size()[1]);
    put([left, top, right, bottom]);
  }

  function point(event) {
    const frame = image.getBoundingClientRect();
    return [(event.clientX - frame.left) / scale(), (event.clientY - frame.top) / scale()];
  }

  stage.addEventListener("pointerdown", (event) => {
    if (!box || event.button > 0 || !event.isPrimary) return;
    event.preventDefault();
    stage.setPointerCapture(event.pointerId);
    const corner = event.target.dataset?.corner;
    const moved =
      event.target === region && !(box[0] === 0 && box[1] === 0 && box[2] === size()[0] && box[3] === size()[1]);
    const start = point(event);
    let last = start;
    const drag = (now) => {
      const next = point(now);
      if (corner) stretch(corner, next[0] - last[0], next[1] - last[1]);
      else if (moved) move(next[0] - last[0], next[1] - last[1]);
      else if (Math.hypot(next[0] - start[0], next[1] - start[1]) * scale() > 3)
        put([
          Math.min(start[0], next[0]),
          Math.min(start[1], next[1]),
          Math.max(start[0], next[0]),
          Math.max(start[1], next[1]),
        ]);
      last = next;
    };
    const dragging = new AbortController();
    const end = () => {
      dragging.abort();
      // A region of no size comes from a slip of the finger.
      if (box[2] - box[0] < LEAST || box[3] - box[1] < LEAST) put([0, 0, ...size()]);
      (corner ? event.target : region).focus();
    };
    // Another finger on the image neither moves the region nor ends it.
    const own = (listener) => (now) => now.pointerId === event.pointerId && listener(now);
    for (const [name, listener] of Object.entries({ pointermove: drag, pointerup: end, pointercancel: end }))
      stage.addEventListener(name, own(listener), { signal: dragging.signal });
  });

  stage.addEventListener("keydown", (event) => {
    const arrow = ARROWS[event.key];
    if (!box || !arrow) return;
    event.preventDefault();
    const step = Math.max(1, Math.round(Math.max(...size()) / 50));
    const [x, y] = arrow.map((one) => one * step);
    const corner = event.target.dataset?.corner ?? (event.shiftKey ? "se" : null);
    if (corner) stretch(corner, x, y);
    else move(x, y);
  });

  return new Promise((resolve) => {
    let chosen;
    // Small images are enlarged, so that a finger can point at their parts.
    const fit = () => {
      const [width, height] = size();
      const room = [Math.min(innerWidth - 64, 880), innerHeight * 0.62];
      const shown = Math.min(room[0] / width, room[1] / height, Math.max(1, 360 / Math.max(width, height)));
      image.style.width = `${width * shown}px`;
      if (box) draw();
    };
    const begin = () => {
      const [width, height] = size();
      const inset = [0.15, 0.15, 0.85, 0.85].map((share, side) => Math.round(share * (side % 2 ? height : width)));
      fit();
      stage.classList.add("ready");
      put(given ?? inset);
      use.disabled = false;
      region.focus();
    };
    if (image.complete && image.naturalWidth) requestAnimationFrame(begin);
    else image.addEventListener("load", begin, { once: true });
    image.addEventListener("error", () => {
      told.textContent = "This browser cannot show the image, so no region of it can be chosen.";
      stage.hidden = true;
    });
    const finish = (value) => {
      chosen = value;
      dialog.close();
    };
    use.addEventListener("click", () => finish(box.map(Math.round)));
    whole.addEventListener("click", () => finish(null));
    region.addEventListener(
      "keydown",
      (event) => event.key === "Enter" && (event.preventDefault(), finish(box.map(Math.round))),
    );
    addEventListener("resize", fit);
    dialog.addEventListener(
      "close",
      () => {
        removeEventListener("resize", fit);
        if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
        resolve(chosen);
      },
      { once: true },
    );
    open(
      dialog,
      h("div", { class: "dialog-head" }, h("h2", { id: "cropping-title" }, "What counts of the image"), closer(dialog)),
      stage,
      h("div", { class: "dialog-foot" }, told, h("div", { class: "buttons" }, given ? whole : null, use)),
    );
  });
}
