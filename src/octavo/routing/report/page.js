// The text, coloured by the expert that is each token's first choice. Everything else on the page is plain HTML.
"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const source = find("token-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const bytes = Uint8Array.from(atob(data.ids), (letter) => letter.charCodeAt(0));
  const ids = data.each === 2 ? new Uint16Array(bytes.buffer) : bytes;
  const n = data.pieces.length;
  const [part, layer, numbers, chips, text, said] = ["part", "layer", "numbers", "chips", "text", "said"].map(find);
  let begin = 0, spans = [], now = -1, only = -1;

  const choice = (token, rank) => {
    const at = Number(layer.value) * n + token;
    if (data.each) return ids[at * data.ranks + rank];
    return rank ? ids[at] & 15 : ids[at] >> 4;
  };

  const colour = () => {
    const counts = new Array(data.experts).fill(0);
    spans.forEach((span, at) => {
      const first = choice(begin + at, 0);
      counts[first] += 1;
      let kind = "t s" + (first % 8);
      if (only >= 0 && first !== only) {
        const second = data.ranks > 1 && choice(begin + at, 1) === only;
        kind = second ? "t second s" + (only % 8) : "t dim";
      }
      span.className = at === now ? kind + " now" : kind;
      if (numbers.checked) span.dataset.e = first;
    });
    counts.forEach((count, expert) => {
      chips.children[expert].lastChild.textContent = Math.round((100 * count) / Math.max(1, spans.length)) + " %";
    });
    find("layer-number").textContent = layer.value;
    layer.setAttribute("aria-valuetext", "layer " + layer.value);
    text.classList.toggle("numbered", numbers.checked);
    tell();
  };

  const tell = () => {
    said.textContent = "";
    if (now < 0) {
      said.textContent = "Point at a token, or move along the text with the arrow keys, to read its experts here.";
      return;
    }
    const token = begin + now;
    const piece = document.createElement("code");
    piece.textContent = data.pieces[token];
    const words = [": in layer " + layer.value + " its first choice is expert " + choice(token, 0)];
    if (data.ranks > 1) words.push("its second expert " + choice(token, 1));
    said.append(piece, words.join(", ") + ".");
  };

  const go = (at) => {
    if (!spans.length) return;
    if (now >= 0) spans[now].classList.remove("now");
    now = Math.min(Math.max(at, 0), spans.length - 1);
    spans[now].classList.add("now");
    tell();
  };

  const show = () => {
    const [, first, end] = data.parts[part.value];
    begin = first;
    now = -1;
    spans = data.pieces.slice(first, end).map((piece, at) => {
      const span = document.createElement("span");
      span.textContent = piece;
      span.at = at;
      return span;
    });
    const fresh = new Set(data.begins);
    text.replaceChildren();
    spans.forEach((span, at) => {
      if (at && fresh.has(begin + at)) text.append(document.createElement("hr"));
      text.append(span);
    });
    text.scrollTop = 0;
    colour();
  };

  data.parts.forEach(([name], at) => part.add(new Option(name, at)));
  for (let expert = 0; expert < data.experts; expert++) {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = "s" + (expert % 8);
    chip.setAttribute("aria-pressed", "false");
    chip.append(String(expert), document.createElement("small"));
    chip.addEventListener("click", () => {
      only = only === expert ? -1 : expert;
      [...chips.children].forEach((one, at) => one.setAttribute("aria-pressed", String(at === only)));
      colour();
    });
    chips.append(chip);
  }
  layer.max = data.layers - 1;
  part.addEventListener("change", show);
  layer.addEventListener("input", colour);
  numbers.addEventListener("change", colour);
  text.addEventListener("pointerover", (event) => {
    if (event.target.at !== undefined && document.activeElement !== text) go(event.target.at);
  });
  text.addEventListener("click", (event) => {
    if (event.target.at !== undefined) go(event.target.at);
  });
  text.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: spans.length - 1 };
    const layers = { ArrowUp: 1, ArrowDown: -1 };
    if (event.key in steps) {
      go(steps[event.key]);
      spans[now].scrollIntoView({ block: "nearest" });
    } else if (event.key in layers) {
      layer.value = Number(layer.value) + layers[event.key];
      colour();
    } else return;
    event.preventDefault();
  });
  show();
})();
