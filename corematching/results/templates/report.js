"use strict";
// Three independent parts: tables that sort and filter, the Pareto plot, and the image overlays.

function prepareTable(table) {
  table.classList.add("sortable");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim();
  };
  const compare = (a, b) => {
    // Holes and words go after numbers, whatever the direction.
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a === "number") return -Infinity;
    if (typeof b === "number") return Infinity;
    return a.localeCompare(b, "en", { numeric: true });
  };
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const number = head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      const up = before ? before === "descending" : !number;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [keyOf(row, column), row]);
      rows.sort(([a], [b]) => {
        const order = compare(a, b);
        return up || !Number.isFinite(order) ? order : -order;
      });
      rows.forEach(([, row]) => body.append(row));
      rule(body, false);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
  const filter = document.createElement("input");
  filter.type = "search";
  filter.placeholder = "filter rows (all words must occur)";
  filter.setAttribute("aria-label", "filter rows");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
  if (body.rows.length > 3) table.before(filter);
  const scroll = document.createElement("div");
  scroll.className = "scroll";
  table.before(scroll);
  scroll.append(table);
  rule(body, true);
}

function rule(body, on) {
  // Rules between budgets make sense in the original order only.
  const rows = [...body.rows];
  rows.forEach((row, place) => {
    row.classList.toggle("rule", on && place > 0 && row.dataset.block !== rows[place - 1].dataset.block);
  });
}

function drawPareto(place, data) {
  const axis = document.getElementById("pareto-axis");
  const draw = () => {
    const [key, label] = data.axes[axis.selectedIndex];
    const traces = data.series.map((series) => ({
      type: "scatter", mode: "lines+markers", name: series.name,
      x: series.points.map((point) => point[key]), y: series.points.map((point) => point.share),
      text: series.points.map((point) => point.hover), hovertemplate: "%{text}<extra></extra>",
      error_y: { type: "data", array: series.points.map((point) => point.half), thickness: 1, width: 0, color: series.color },
      line: { color: series.color, width: 1.2 },
      // Hollow, so that no method hides another.
      marker: { color: series.color, symbol: series.symbol + "-open", size: 9, line: { width: 1.6 } },
    }));
    const lines = data.series.reduce((sum, series) => sum + series.name.split("<br>").length, 0);
    const narrow = place.clientWidth < 760;
    const legend = narrow ? { orientation: "h", y: -0.25, yanchor: "top", x: 0 } : { x: 1.01, y: 1 };
    const layout = {
      // The toolbar stands in the margin above the plot; the legend has the height that its lines need.
      height: narrow ? 430 + 24 * lines : Math.max(450, 110 + 19 * lines),
      margin: { l: 60, r: 20, t: 46, b: 50 }, hovermode: "closest", font: { size: 13 },
      legend: { ...legend, font: { size: 12 }, tracegroupgap: 0 },
      xaxis: { title: { text: label }, rangemode: "tozero", gridcolor: "#e6e6e6" },
      yaxis: { title: { text: "% of dense accuracy" }, gridcolor: "#e6e6e6" },
    };
    Plotly.react(place, traces, layout, { displaylogo: false, responsive: true });
  };
  axis.addEventListener("change", draw);
  draw();
}

function showOverlays(data) {
  const at = (name) => document.getElementById("overlay-" + name);
  const canvas = at("canvas");
  const images = {};
  const fill = (select, texts) => {
    select.replaceChildren(...texts.map((text) => new Option(text)));
    select.selectedIndex = 0;
  };
  const draw = (image, kept, tile) => {
    const context = canvas.getContext("2d");
    const [width, height] = [canvas.width, canvas.height];
    context.drawImage(image, 0, 0, width, height);
    const stays = new Set(kept);
    context.fillStyle = "rgba(222, 222, 222, 0.82)";
    if (!tile) return;
    const { first, rows, columns, stride } = tile;
    for (let index = 0; index < rows * columns; index++) {
      const [row, column] = [Math.floor(index / columns), index % columns];
      if (stays.has(first + row * stride + column)) continue;
      context.fillRect((column * width) / columns, (row * height) / rows, width / columns, height / rows);
    }
  };
  const answersOf = (example) => example.answers.filter((answer) => answer.method === at("method").value);
  const update = () => {
    const example = data.examples[at("example").selectedIndex];
    const answers = answersOf(example);
    at("keep").max = answers.length - 1;
    const answer = answers[Math.min(Number(at("keep").value), answers.length - 1)];
    const stages = answer.stages;
    at("layer").max = stages.length - 1;
    const stage = stages[Math.min(Number(at("layer").value), stages.length - 1)];
    at("keep-text").textContent = answer.keep;
    at("layer-text").textContent = `from layer ${stage.layer} on: ${stage.kept.length} tokens`;
    at("question").textContent = example.question;
    at("target").textContent = example.target;
    at("prediction").textContent = answer.prediction;
    const right = answer.prediction.trim().toLowerCase() === example.target.trim().toLowerCase();
    at("prediction").className = right ? "" : "wrong";
    const source = data.images[example.image];
    images[example.image] ??= Object.assign(new Image(), { src: source });
    const image = images[example.image];
    if (image.complete) draw(image, stage.kept, example.tile);
    else image.addEventListener("load", update, { once: true });
  };
  fill(at("example"), data.examples.map((one, place) => `${place + 1}. ${one.question.split("\n")[0]}`));
  const methods = [...new Set(data.examples[0].answers.map((answer) => answer.method))];
  fill(at("method"), methods);
  at("method").selectedIndex = Math.max(0, methods.findIndex((name) => name !== "dense"));
  at("method").addEventListener("change", () => {
    at("keep").value = 0;
    at("layer").max = 99;
    at("layer").value = 99;
    update();
  });
  at("example").addEventListener("change", update);
  at("keep").addEventListener("input", update);
  at("layer").addEventListener("input", update);
  at("method").dispatchEvent(new Event("change"));
}

document.querySelectorAll("table").forEach(prepareTable);
for (const [id, show] of [
  ["pareto-data", (data) => drawPareto(document.getElementById("pareto"), data)],
  ["overlay-data", showOverlays],
]) {
  const holder = document.getElementById(id);
  if (holder) show(JSON.parse(holder.textContent));
}
