// The order viewer: one image under one policy, step by step. At step t the page shows the state before the step
// and outlines the blocks that it takes; at the last position everything is visible.
(async () => {
  const HIDDEN = "rgb(128 128 128)";
  const PAUSE = 600; // milliseconds between steps while playing
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const part = (name) => document.querySelector(`[data-part="${name}"]`);
  const blocks = data.rows * data.columns;
  const state = { image: 0, policy: Number(part("policy").value), step: 0 };
  let timer = null;

  const pictures = await Promise.all(
    data.policies[0].episodes.map(async (_, index) => {
      const picture = new Image();
      picture.src = document.getElementById(`example-${index + 1}`).href.baseVal;
      await picture.decode();
      return picture;
    }),
  );

  const episode = () => data.policies[state.policy].episodes[state.image];
  const visibleBefore = (step) => new Set(episode().steps.slice(0, step).flat());
  const place = (block) => ({ row: Math.floor(block / data.columns), column: block % data.columns });
  const round = (value) => Number(value.toPrecision(3)).toString().replace("-", "−");

  function draw(parent, name, attributes, text = "") {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    parent.append(element);
  }

  function clear(name, viewBox) {
    const svg = part(name);
    svg.replaceChildren();
    svg.setAttribute("viewBox", viewBox);
    return svg;
  }

  function outline(svg, chosen) {
    for (const kind of ["halo", "chosen"]) {
      for (const { row, column } of chosen.map(place)) {
        draw(svg, "rect", { class: kind, x: column + 0.04, y: row + 0.04, width: 0.92, height: 0.92 });
      }
    }
  }

  function drawImage(visible, chosen) {
    const canvas = part("image");
    const picture = pictures[state.image];
    canvas.width = picture.naturalWidth;
    canvas.height = picture.naturalHeight;
    canvas.classList.toggle("small", picture.naturalWidth < 100);
    const context = canvas.getContext("2d");
    const [width, height] = [canvas.width / data.columns, canvas.height / data.rows];
    context.drawImage(picture, 0, 0);
    context.fillStyle = HIDDEN;
    for (let block = 0; block < blocks; block++) {
      const { row, column } = place(block);
      if (!visible.has(block)) context.fillRect(column * width, row * height, width, height);
    }
    outline(clear("marks", `0 0 ${data.columns} ${data.rows}`), chosen);
  }

  // Scores are stored as one character for each hidden block in raster order, from the lowest to the highest.
  function hiddenScores(visible) {
    const { scores, ranges } = episode();
    if (!scores || state.step === scores.length) return null;
    const levels = [...scores[state.step]].map((character) => data.levels.indexOf(character));
    const hidden = [...Array(blocks).keys()].filter((block) => !visible.has(block));
    const [low, high] = ranges[state.step];
    return { low, high, level: new Map(hidden.map((block, index) => [block, levels[index]])) };
  }

  function drawScores(visible, chosen) {
    const svg = clear("scores", `0 0 ${data.columns} ${data.rows}`);
    const scores = hiddenScores(visible);
    const revealed = new Map(episode().steps.flatMap((step, index) => step.map((block) => [block, index + 1])));
    for (let block = 0; block < blocks; block++) {
      const { row, column } = place(block);
      const area = { x: column, y: row, width: 1, height: 1 };
      if (visible.has(block)) {
        draw(svg, "rect", { ...area, class: "visible" });
        const middle = { x: column + 0.5, y: row + 0.5, class: "number" };
        if (data.columns <= 12) draw(svg, "text", middle, revealed.get(block));
      } else {
        draw(svg, "rect", { ...area, fill: scores ? data.palette[scores.level.get(block)] : HIDDEN });
      }
    }
    outline(svg, chosen);
    part("scale").hidden = !scores;
    if (scores) {
      part("low").textContent = round(scores.low);
      part("high").textContent = round(scores.high);
    }
    const without = chosen.length ? "This policy gives no scores" : "Nothing is left to score";
    part("legend").textContent = `${scores ? "Scores of the hidden blocks" : without}; numbers are the steps so far`;
  }

  function drawCurve() {
    const { steps, loss } = episode();
    const [left, right, top, bottom] = [44, 286, 14, 176];
    const most = Math.max(...loss);
    const x = (visible) => left + ((right - left) * visible) / blocks;
    const y = (value) => bottom - ((bottom - top) * value) / (most || 1);
    const visible = [0];
    for (const step of steps) visible.push(visible.at(-1) + step.length);
    const points = loss.map((value, index) => `${x(visible[index]).toFixed(1)},${y(value).toFixed(1)}`);
    const svg = clear("curve", "0 0 300 200");
    draw(svg, "path", { class: "area", d: `M${left},${bottom}L${points.slice(0, state.step + 1).join("L")}V${bottom}Z` });
    draw(svg, "path", { class: "axis", d: `M${left},${top}V${bottom}H${right}` });
    draw(svg, "path", { class: "line", d: `M${points.join("L")}` });
    draw(svg, "text", { x: left - 6, y: top + 4, class: "end" }, round(most));
    draw(svg, "text", { x: left - 6, y: bottom + 4, class: "end" }, "0");
    draw(svg, "text", { x: left, y: bottom + 17, class: "middle" }, "0");
    draw(svg, "text", { x: right, y: bottom + 17, class: "middle" }, blocks);
    const now = { x: x(visible[state.step]), y: y(loss[state.step]) };
    draw(svg, "path", { class: "now", d: `M${now.x},${bottom}V${now.y}` });
    draw(svg, "circle", { class: "now", cx: now.x, cy: now.y, r: 5 });
    const inside = now.x > right - 60 ? { x: now.x - 2, class: "end value" } : { x: now.x + 9, class: "value" };
    draw(svg, "text", { ...inside, y: Math.max(now.y - 7, top) }, round(loss[state.step]));
  }

  function describe(visible, chosen) {
    const { steps, loss } = episode();
    const left = `${visible.size} of ${blocks} blocks visible, remaining loss ${round(loss[state.step])} ${data.unit}`;
    if (!chosen.length) return `Complete after ${steps.length} steps: ${left}.`;
    const named = chosen.map((block) => `row ${place(block).row + 1}, column ${place(block).column + 1}`);
    return `Step ${state.step + 1} of ${steps.length}: ${left}. Takes ${named.join("; ")}.`;
  }

  function show() {
    const total = episode().steps.length;
    const visible = visibleBefore(state.step);
    const chosen = episode().steps[state.step] ?? [];
    part("step").max = total;
    part("step").value = state.step;
    part("count").textContent = `${state.step} / ${total}`;
    part("status").textContent = describe(visible, chosen);
    part("step").setAttribute("aria-valuetext", part("status").textContent);
    drawImage(visible, chosen);
    drawScores(visible, chosen);
    drawCurve();
  }

  function moveTo(step) {
    state.step = Math.min(Math.max(step, 0), episode().steps.length);
    show();
  }

  // Another policy or image is shown with about as many visible blocks.
  function change(key, value) {
    const before = visibleBefore(state.step).size;
    state[key] = value;
    const { steps } = episode();
    let [step, visible] = [0, 0];
    while (step < steps.length && visible + steps[step].length <= before) visible += steps[step++].length;
    moveTo(step);
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    part("play").textContent = "Play";
    part("status").setAttribute("aria-live", "polite");
  }

  function play() {
    if (state.step === episode().steps.length) moveTo(0);
    part("play").textContent = "Pause";
    part("status").setAttribute("aria-live", "off"); // or every step would be read out
    timer = setInterval(() => {
      moveTo(state.step + 1);
      if (state.step === episode().steps.length) pause();
    }, PAUSE);
  }

  part("play").addEventListener("click", () => (timer === null ? play() : pause()));
  part("policy").addEventListener("change", (event) => change("policy", Number(event.target.value)));
  part("step").addEventListener("input", (event) => {
    pause();
    moveTo(Number(event.target.value));
  });
  for (const radio of document.querySelectorAll('[data-part="viewer"] input[type="radio"]')) {
    radio.addEventListener("change", () => change("image", Number(radio.value)));
  }
  part("viewer").addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || event.target.matches("input, select")) return; // these have arrow keys of their own
    event.preventDefault();
    pause();
    moveTo(state.step + move);
  });

  part("gradient").style.background = `linear-gradient(to right, ${data.palette.join(", ")})`;
  part("without").hidden = true;
  part("viewer").hidden = false;
  moveTo(Math.floor(episode().steps.length / 3));
})();
