"use strict";
// Draw the curves. A contender has a line of its mean, a band from its lowest to its highest seed, and its single runs.
(function () {
  const data = JSON.parse(document.getElementById("curve-data").textContent);
  const place = document.getElementById("curves");
  const chosen = { x: "steps", span: "whole", val: true, train: true, runs: false };
  const hidden = new Set();
  const TARGET = "target";
  const PLOT_HEIGHT = 380; // pixels, without the legend

  function visible(contender, layer) {
    return chosen[layer] && !hidden.has(contender.label);
  }

  function line(contender, layer, look) {
    return {
      type: "scatter", mode: "lines", name: contender.label, legendgroup: contender.label, showlegend: false,
      visible: visible(contender, layer), line: { ...contender.line, width: look.width },
      opacity: look.opacity ?? 1,
    };
  }

  function bandTraces(contender, layer, look, words) {
    const curve = contender[layer];
    if (curve === null) return [];
    const x = curve[chosen.x];
    const edges = {
      ...line(contender, layer, look), x: x.concat(x.slice().reverse()),
      y: curve.highest.concat(curve.lowest.slice().reverse()),
      fill: "toself", fillcolor: contender.line.color, line: { width: 0 }, opacity: 0.16, hoverinfo: "skip",
    };
    const mean = {
      ...line(contender, layer, look), x: x, y: curve.mean,
      customdata: x.map((_, i) => [curve.lowest[i], curve.highest[i], curve.steps[i]]),
      hovertemplate: words + " {{ metric.name }} <b>%{y:{{ metric.format }}}</b> (%{customdata[0]:{{ metric.format }}} to %{customdata[1]:{{ metric.format }}})<br>step %{customdata[2]:,}",
    };
    if (look.markers && x.length <= 60) {
      mean.mode = "lines+markers";
      mean.marker = { size: 4, color: contender.line.color };
    }
    return [edges, mean];
  }

  function runTraces(contender) {
    return contender.runs.map((run) => {
      const trace = {
        ...line(contender, "runs", { width: 0.8, opacity: 0.6 }), x: run.train[chosen.x], y: run.train.losses,
        customdata: run.train.steps, text: run.name,
        hovertemplate: "%{text}<br>training {{ metric.name }} %{y:{{ metric.format }}}<br>step %{customdata:,}",
      };
      // A diverged run is in no band, so show it with the training curves too.
      if (run.diverged) trace.visible = (chosen.train || chosen.runs) && !hidden.has(contender.label);
      return trace;
    });
  }

  function legendTrace(contender) {
    return {
      ...line(contender, "val", { width: 2.5 }), x: [null], y: [null], showlegend: true,
      visible: hidden.has(contender.label) ? "legendonly" : true,
    };
  }

  function targetTraces() {
    if (data.target === null) return [];
    const bands = data.contenders.flatMap((contender) => [contender.train, contender.val]).filter((curve) => curve !== null);
    const last = Math.max(0, ...bands.map((curve) => curve[chosen.x].at(-1)));
    return [{
      type: "scatter", mode: "lines", name: TARGET, x: [0, last], y: [data.target, data.target], hoverinfo: "skip",
      visible: hidden.has(TARGET) ? "legendonly" : true, line: { color: "#868e96", width: 1.5, dash: "dot" },
    }];
  }

  function drawn() {
    return [...data.contenders.flatMap((contender) => [
      legendTrace(contender),
      ...runTraces(contender),
      ...bandTraces(contender, "train", { width: 0.9, opacity: 0.75 }, "training"),
      ...bandTraces(contender, "val", { width: 2, markers: true }, "validation"),
    ]), ...targetTraces()];
  }

  function ranges() {
    const curves = data.contenders.flatMap((contender) =>
      ["train", "val"].filter((layer) => visible(contender, layer)).map((layer) => contender[layer])
    ).filter((curve) => curve !== null);
    const last = Math.max(0, ...curves.map((curve) => curve[chosen.x].at(-1)));
{# An outlier among accuracies is a low one: ranges are those of the negative values. #}
    // Exclude the beginning: losses fall so much there that they would hide everything else.
    const begin = last * (chosen.span === "half" ? 0.5 : 0.2);
    const late = curves.map((curve) => curve.mean.filter((loss, i) => loss !== null && curve[chosen.x][i] >= begin){{ ".map((value) => -value)"|safe if metric.sign < 0 else "" }})
      .filter((losses) => losses.length > 0);
    if (last === 0 || late.length === 0) return {};
    const low = Math.min(...late.map((losses) => Math.min(...losses)));
    const highs = late.map((losses) => Math.max(...losses)).sort((a, b) => a - b);
    // Exclude outliers: they would compress the rest of the scale.
    const middle = highs[Math.floor(highs.length / 2)];
    const high = highs.filter((loss) => highs.length < 5 || loss <= middle + 3 * (middle - low)).at(-1);
    const margin = 0.06 * Math.max(high - low, 1e-3);
    return { x: [chosen.span === "half" ? begin : 0, last * 1.01], y: {{ metric.either("[low - margin, high + margin]", "[-high - margin, margin - low]") }} };
  }

  // On a narrow screen a legend has a row for each name. Without this room, plotly would shrink the plot.
  function legendHeight() {
    const longest = Math.max(...data.contenders.map((contender) => contender.label.length));
    const columns = Math.max(1, Math.floor((place.clientWidth - 72) / (60 + 7 * longest)));
    return 20 * Math.ceil((data.contenders.length + 1) / columns);
  }

  function layout() {
    const range = ranges();
    const axis = { gridcolor: "#e9ecef", linecolor: "#adb5bd", ticks: "outside", tickcolor: "#adb5bd", zeroline: false };
    return {
      height: PLOT_HEIGHT + 70 + legendHeight(), margin: { l: 60, r: 12, t: 12, b: 58 + legendHeight() },
      font: { family: "system-ui, sans-serif", size: 12, color: "#212529" },
      paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest",
      hoverlabel: { bgcolor: "#fff", namelength: -1 },
      xaxis: { ...axis, title: { text: data.titles[chosen.x] }, range: range.x, autorange: range.x === undefined },
      yaxis: { ...axis, title: { text: "{{ metric.name }}" }{{ ', tickformat: ".2~%"'|safe if metric.is_share else "" }}, range: range.y, autorange: range.y === undefined },
      legend: { orientation: "h", y: -60 / PLOT_HEIGHT, yanchor: "top" },
    };
  }

  function draw() {
    return Plotly.react(place, drawn(), layout(), {
      responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    });
  }

  function toggle(label) {
    if (!hidden.delete(label)) hidden.add(label);
  }

  // Show one contender alone, or all again.
  function isolate(label) {
    const others = data.contenders.map((contender) => contender.label).filter((name) => name !== label);
    const alone = !hidden.has(label) && others.every((name) => hidden.has(name));
    hidden.clear();
    if (!alone) others.forEach((name) => hidden.add(name));
  }

  draw().then(() => {
    // A double click also fires two clicks, which cancel each other.
    for (const [name, act] of [["plotly_legendclick", toggle], ["plotly_legenddoubleclick", isolate]]) {
      place.on(name, (event) => {
        act(event.data[event.curveNumber].name);
        draw();
        return false;
      });
    }
  });

  window.addEventListener("resize", draw);

  for (const input of document.querySelectorAll("#curve-switches input")) {
    input.addEventListener("change", () => {
      chosen[input.name] = input.type === "radio" ? input.value : input.checked;
      draw();
    });
  }
})();
