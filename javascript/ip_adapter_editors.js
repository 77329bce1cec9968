/* Editors of layers, time, place, mixtures and negatives. They are drawn when a person first opens them, and write the
   unit's slot through ipAdapter.edit, so what they show is what a request, a pasted infotext or they themselves gave. */
"use strict";

(() => {
    const { element, find, current, edit, put, give, stepsOf, factsOf, askSaved, savedOf, change } = ipAdapter;
    const SVG = "http://www.w3.org/2000/svg";
    const [WIDTH, HEIGHT] = [320, 120];  // of the plots
    const FACTORS = [-5, 5];  // what a curve's or a layer's factor may be
    const LONGER_SIDE = 256;  // pixels of a mask that is drawn: soft enough for the finest grid of attention
    const drawn = {};  // by unit: functions that show its fields anew
    const masksSeen = {};  // by hash: what was drawn or chosen here

    let shared = null;
    const facts = () => (shared ??= JSON.parse(gradioApp().querySelector(".ip-adapter-editors-facts").dataset.facts));

    const valueOf = (unit, field) => current(unit)[field.name] ?? field.default;
    const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

    // A field's default isn't written, so that a unit says only what somebody chose.
    function set(unit, field, value) {
        edit(unit, { [field.name]: same(value, field.default) ? undefined : value });
    }

    function svg(tag, attributes, title) {
        const made = document.createElementNS(SVG, tag);
        for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
        if (title) made.append(Object.assign(document.createElementNS(SVG, "title"), { textContent: title }));
        return made;
    }

    function canvasOf(unit) {
        const tab = unit.includes("img2img") ? "img2img" : "txt2img";
        const [width, height] = ["width", "height"].map((each) => Number(find(`${tab}_${each}`)?.querySelector("input")?.value) || 512);
        const scale = LONGER_SIDE / Math.max(width, height);
        return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
    }

    // --- single fields

    function labelled(unit, field, input) {
        const label = element("label", "ip-adapter-field", { title: field.help || "" });
        label.append(element("span", "", { textContent: field.label }), input, element("small", "", { textContent: field.help || "" }));
        input.dataset.field = field.name;
        return label;
    }

    function makeField(unit, field) {
        if (field.options) {
            const input = element("select", "");
            const names = Object.keys(field.options);
            for (const name of names) input.append(element("option", "", { value: name, textContent: name }));
            const label = labelled(unit, field, input);
            input.addEventListener("change", () => set(unit, field, input.value));
            return [label, () => {
                const value = valueOf(unit, field);
                let own = input.querySelector("[data-own]");
                if (!names.includes(value)) {  // custom layers
                    if (!own) input.append((own = element("option", "", { textContent: "custom" })));
                    own.dataset.own = own.value = value;
                } else own?.remove();
                input.value = value;
                label.querySelector("small").textContent = field.options[value] ?? value;
            }];
        }
        if (field.bounds) {
            const [min, max] = field.bounds;
            const input = element("input", "", { type: "number", min, max, step: 0.05 });
            input.addEventListener("change", () => {
                set(unit, field, input.value === "" ? field.default : Math.min(max, Math.max(min, Number(input.value))));
            });
            return [labelled(unit, field, input), () => {
                if (document.activeElement !== input) input.value = valueOf(unit, field) ?? "";
                const values = facts().fields.filter((each) => field.needs[each.name]);
                input.disabled = !values.every((each) => field.needs[each.name].includes(valueOf(unit, each)));
            }];
        }
        const input = element("input", "", field.text ? { type: "text" } : { type: "checkbox" });
        input.addEventListener("change", () => set(unit, field, field.text ? input.value.trim() : input.checked));
        return [labelled(unit, field, input), () => {
            if (!field.text) input.checked = valueOf(unit, field);
            else if (document.activeElement !== input) input.value = valueOf(unit, field);
        }];
    }

    // --- layers: a bar for each group, which is the editor of custom weights too

    function groupsOf(unit) {
        const count = factsOf(unit).groups || 16;
        const layers = current(unit).layers || "all";
        const { weight = 1, composition_weight: other } = current(unit);
        const table = facts().types[layers]?.[count];
        if (table)
            return table.map(([own, composed, swapped, picture]) => ({
                factor: own + (composed && weight ? (composed * (other ?? weight)) / weight : 0), swapped, picture,
            }));
        const factors = Object.fromEntries(layers.split(/[,;\n]/).map((each) => each.split(":").map(Number)));
        return Array.from({ length: count }, (_, n) => ({ factor: factors[n] || 0 }));
    }

    function makeBars(unit) {
        const plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "ip-adapter-bars" });
        const field = facts().fields.find((each) => each.name === "layers");
        const top = 2;
        let held = null;
        const factorAt = (event) => {
            const box = plot.getBoundingClientRect();
            const factor = top * (1 - ((event.clientY - box.top) / box.height) * (HEIGHT / (HEIGHT - 16)));
            return Math.min(top, Math.max(0, Math.round(factor * 20) / 20));
        };
        const groupAt = (event, count) => {
            const box = plot.getBoundingClientRect();
            return Math.min(count - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * count)));
        };
        const change = (event) => {
            held[groupAt(event, held.length)] = factorAt(event);
            if (held.some(Boolean)) show(held.map((factor) => ({ factor })));
        };
        function show(groups) {
            plot.replaceChildren();
            const wide = WIDTH / groups.length;
            const [inputs, middle] = groups.length === 11 ? [4, 4] : [6, 6];
            groups.forEach(({ factor, swapped, picture }, n) => {
                const block = n < inputs ? "input" : n === middle ? "middle" : "output";
                const size = (Math.min(Math.abs(factor), top) / top) * (HEIGHT - 16);
                const rows = swapped ? ", on the negative side" : "";
                const of = picture === null || picture === undefined ? "" : `, picture ${picture + 1}`;
                const title = `Group ${n}, ${block}: ${Math.round(factor * 1000) / 1000} of the strength${rows}${of}`;
                plot.append(svg("rect", { x: n * wide, y: 0, width: wide, height: HEIGHT, class: "ip-adapter-slot" }, title));
                const kind = factor < 0 || swapped ? "ip-adapter-bar ip-adapter-against" : "ip-adapter-bar";
                plot.append(svg("rect", { x: n * wide + 1, y: HEIGHT - 16 - size, width: wide - 2, height: size, class: kind }, title));
                const text = svg("text", { x: (n + 0.5) * wide, y: HEIGHT - 4, "text-anchor": "middle" });
                text.textContent = `${block[0]}${n}`;
                plot.append(text);
            });
        }
        plot.addEventListener("pointerdown", (event) => {
            event.preventDefault();
            plot.setPointerCapture(event.pointerId);
            held = groupsOf(unit).map(({ factor }) => factor);
            change(event);
        });
        plot.addEventListener("pointermove", (event) => held && change(event));
        plot.addEventListener("pointerup", () => {
            if (!held) return;
            const text = held.map((factor, n) => [n, factor]).filter(([, factor]) => factor).map(([n, factor]) => `${n}:${Math.min(FACTORS[1], Math.max(FACTORS[0], Number(factor.toFixed(4))))}`).join(", ");
            held = null;
            if (text) set(unit, field, text);
            else show(groupsOf(unit));
        });
        const note = element("small", "", { textContent: "Bars: share of the strength by layer group, 0 to 2, i: input, m: middle, o: output. Drag to make custom ones." });
        const box = element("div", "");
        box.append(plot, note);
        return [box, () => held || show(groupsOf(unit))];
    }

    // --- time: the curve as a plot, with the steps of a pass

    function pointsOf(text) {
        const points = text.split(/[,;\n]/).filter((each) => each.trim()).map((each) => each.split("@").map((part) => (part.trim() ? Number(part) : NaN)));
        const good = points.every(([value, at]) => Number.isFinite(value) && at >= 0 && at <= 1) && points.every(([, at], i) => !i || at >= points[i - 1][1]);
        return good ? points : null;
    }

    const textOf = (points) => points.map(([value, at]) => `${Number(value.toFixed(3))}@${Number(at.toFixed(3))}`).join(", ");

    function makePlot(unit, name) {
        const field = facts().fields.find((each) => each.name === name);
        const plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "ip-adapter-plot", "data-plot": name });
        let held = null;  // the points and the number of the one that is dragged
        let [low, high] = [0, 1];
        const x = (at) => 8 + at * (WIDTH - 16);
        const y = (value) => HEIGHT - 12 - ((value - low) / (high - low)) * (HEIGHT - 24);
        const spot = (event) => {
            const box = plot.getBoundingClientRect();
            const at = ((event.clientX - box.left) / box.width) * WIDTH;
            const up = ((event.clientY - box.top) / box.height) * HEIGHT;
            const value = low + ((HEIGHT - 12 - up) / (HEIGHT - 24)) * (high - low);
            return [Math.min(FACTORS[1], Math.max(FACTORS[0], Math.round(value * 20) / 20)), Math.min(1, Math.max(0, (at - 8) / (WIDTH - 16)))];
        };
        function show(points) {
            plot.replaceChildren();
            if (!held) [low, high] = [Math.min(0, ...points.map(([value]) => value)), Math.max(1.5, ...points.map(([value]) => value + 0.25))];
            for (const [value, dash] of [[0, ""], [1, "3 3"]])
                plot.append(svg("line", { x1: x(0), x2: x(1), y1: y(value), y2: y(value), class: "ip-adapter-line", "stroke-dasharray": dash }));
            for (const [n, at] of stepsOf(unit, current(unit).timing || "noise").entries())
                plot.append(svg("line", { x1: x(at), x2: x(at), y1: HEIGHT - 8, y2: HEIGHT - 1, class: "ip-adapter-step" }, `Step ${n + 1}`));
            const all = points.length ? [[points[0][0], 0], ...points, [points[points.length - 1][0], 1]] : [[1, 0], [1, 1]];
            plot.append(svg("polyline", { points: all.map(([value, at]) => `${x(at)},${y(value)}`).join(" "), class: "ip-adapter-curve" }));
            points.forEach(([value, at], n) => plot.append(svg("circle", { cx: x(at), cy: y(value), r: 5, "data-point": n }, `${value} at ${Number(at.toFixed(3))}; double click removes it`)));
        }
        const now = () => pointsOf(valueOf(unit, field)) || [];
        const place = (points, value, at) => {
            const n = points.filter(([, other]) => other <= at).length;
            points.splice(n, 0, [value, at]);
            return n;
        };
        plot.addEventListener("pointerdown", (event) => {
            const n = event.target.dataset?.point;
            event.preventDefault();
            plot.setPointerCapture(event.pointerId);
            const points = now();
            held = { points, n: n === undefined ? null : Number(n), moved: false };
        });
        plot.addEventListener("pointermove", (event) => {
            if (!held || held.n === null) return;
            const [value, at] = spot(event);
            const { points, n } = held;
            held.moved = true;
            points[n] = [value, Math.min(points[n + 1]?.[1] ?? 1, Math.max(points[n - 1]?.[1] ?? 0, at))];
            show(points);
        });
        plot.addEventListener("pointerup", () => {
            const done = held;
            held = null;
            if (done?.moved) set(unit, field, textOf(done.points));
        });
        plot.addEventListener("dblclick", (event) => {
            const points = now();
            const near = document.elementsFromPoint(event.clientX, event.clientY).find((each) => each.dataset?.point && plot.contains(each));
            if (near) points.splice(Number(near.dataset.point), 1);
            else place(points, ...spot(event));
            set(unit, field, textOf(points));
        });
        const note = element("small", "", { textContent: "Double click adds or removes a point, dragging moves it. Marks below: the steps of a pass." });
        const box = element("div", "");
        box.append(plot, note);
        return [box, () => held || show(now())];
    }

    // --- place: a template, a picture, or what is drawn here

    function paintTemplate(context, template) {
        const { width, height } = context.canvas;
        const { values, columns, rows } = facts().templates[template];
        context.fillStyle = "black";
        context.fillRect(0, 0, width, height);
        values.forEach((line, r) => line.forEach((value, c) => {
            context.fillStyle = `rgb(${value * 255}, ${value * 255}, ${value * 255})`;
            context.fillRect(columns[c] * width, rows[r] * height, (columns[c + 1] - columns[c]) * width, (rows[r + 1] - rows[r]) * height);
        }));
    }

    // Of the whole unit, or of one of its pictures by its number.
    const maskOf = (unit, picture) => {
        const mask = (picture === "" ? current(unit) : (current(unit).images || [])[Number(picture)] || {}).mask || "";
        if (typeof mask !== "string") return mask;
        return facts().templates[mask] ? { template: mask } : mask ? { data: mask } : {};
    };

    function makeMask(unit) {
        const box = element("div", "ip-adapter-mask");
        const whose = element("select", "");
        const choose = element("select", "");
        for (const [value, textContent] of [["", "everywhere"], ...Object.keys(facts().templates).map((name) => [name, name]), ["picture", "a picture"]])
            choose.append(element("option", "", { value, textContent }));
        choose.querySelector("[value=picture]").disabled = true;
        const feather = element("input", "", { type: "number", min: 0, max: 1, step: 0.01 });
        const invert = element("input", "", { type: "checkbox" });
        const file = element("input", "", { type: "file", accept: "image/*" });
        const canvas = element("canvas", "", { title: "Draw here where the unit acts" });
        const brush = element("input", "", { type: "range", min: 2, max: 80, value: 24, title: "Width of the brush" });
        const erase = element("input", "", { type: "checkbox" });
        const context = canvas.getContext("2d");
        const write = (changes) => {
            const picture = whose.value;
            const mask = { ...maskOf(unit, picture), ...changes };
            const given = mask.template || mask.data || mask.sha256;
            for (const name of ["template", "data", "sha256", "feather", "invert"]) if (!mask[name]) delete mask[name];
            if (picture === "") edit(unit, { mask: given ? mask : undefined });
            else change(unit, (entries) => {
                delete entries[picture].mask;
                if (given) entries[picture].mask = mask;
            });
        };
        whose.addEventListener("change", () => refresh(unit));
        choose.addEventListener("change", () => write({ template: choose.value, data: "", sha256: "" }));
        feather.addEventListener("change", () => write({ feather: Math.min(1, Math.max(0, Number(feather.value))) }));
        invert.addEventListener("change", () => write({ invert: invert.checked }));
        const keep = (sources) => give(unit, sources, ([sha256], uris) => {
            if (!sha256) return;
            masksSeen[sha256] = uris[0];
            write({ template: "", data: "", sha256 });
        });
        file.addEventListener("change", () => {
            keep([...file.files]);
            file.value = "";
        });
        let last = null;
        const spot = (event) => {
            const area = canvas.getBoundingClientRect();
            return [((event.clientX - area.left) / area.width) * canvas.width, ((event.clientY - area.top) / area.height) * canvas.height];
        };
        const stroke = (event) => {
            const to = spot(event);
            Object.assign(context, { lineWidth: Number(brush.value), lineCap: "round", strokeStyle: erase.checked ? "black" : "white" });
            context.beginPath();
            context.moveTo(...last);
            context.lineTo(...to);
            context.stroke();
            last = to;
        };
        canvas.addEventListener("pointerdown", (event) => {
            event.preventDefault();
            canvas.setPointerCapture(event.pointerId);
            last = spot(event);
            stroke(event);
        });
        canvas.addEventListener("pointermove", (event) => last && stroke(event));
        canvas.addEventListener("pointerup", () => {
            if (!last) return;
            last = null;
            keep([canvas.toDataURL("image/png")]);
        });
        const row = (text, input, help) => labelled(unit, { name: `mask_${text.toLowerCase().replace(/ /g, "_")}`, label: text, help }, input);
        const clear = element("button", "ip-adapter-button", { type: "button", textContent: "Clear", title: "Act everywhere again" });
        clear.addEventListener("click", () => write({ template: "", data: "", sha256: "", feather: 0, invert: false }));
        box.append(
            row("Mask of", whose, "A picture's and the unit's are multiplied."), row("Where", choose, "White acts, black doesn't."), row("Feather", feather, "Soft edges, 0 to 1 of the shorter side."),
            row("Invert", invert, "Act where it is black."), row("From file", file, "A picture, stretched over the canvas."), canvas,
            row("Brush", brush, "Drawn on the canvas's proportions."), row("Erase", erase, "Paint black."), clear,
        );
        return [box, () => {
            if (last) return;
            const names = ["the unit", ...(current(unit).images || []).map((_, n) => `picture ${n + 1}`)];
            if (!same(names, [...whose.options].map((each) => each.textContent))) {
                const before = whose.value;
                whose.replaceChildren(...names.map((textContent, n) => element("option", "", { value: n ? n - 1 : "", textContent })));
                whose.value = Number(before) < names.length - 1 ? before : "";
            }
            const mask = maskOf(unit, whose.value);
            const source = mask.data || masksSeen[mask.sha256];
            choose.value = mask.template || (mask.data || mask.sha256 ? "picture" : "");
            if (document.activeElement !== feather) feather.value = mask.feather || 0;
            invert.checked = Boolean(mask.invert);
            [canvas.width, canvas.height] = canvasOf(unit);
            if (mask.template) paintTemplate(context, mask.template);
            else {
                context.fillStyle = mask.sha256 && !source ? "gray" : "black";
                context.fillRect(0, 0, canvas.width, canvas.height);
                if (source) {
                    const image = new Image();
                    image.onload = () => context.drawImage(image, 0, 0, canvas.width, canvas.height);
                    image.src = source.startsWith("data:") ? source : `data:image/png;base64,${source}`;
                }
            }
            canvas.title = mask.sha256 && !source ? `The kept picture ${mask.sha256.slice(0, 10)}; draw to replace it` : "Draw here where the unit acts";
        }];
    }

    // --- negatives: pictures in place of the uncond source

    function makeNegatives(unit) {
        const box = element("div", "");
        const file = element("input", "", { type: "file", accept: "image/*", multiple: true });
        const said = element("span", "");
        const clear = element("button", "ip-adapter-button", { type: "button", textContent: "Remove", title: "No negative pictures" });
        file.addEventListener("change", () => {
            give(unit, [...file.files], (hashes) => {
                const now = current(unit).negative_images || [];
                if (hashes.length) edit(unit, { negative_images: [...now, ...hashes.map((sha256) => ({ sha256 }))] });
            });
            file.value = "";
        });
        clear.addEventListener("click", () => edit(unit, { negative_images: undefined }));
        box.append(labelled(unit, { name: "negative_images", label: "Negative pictures", help: "What the result shall not be like." }, file), said, clear);
        return [box, () => {
            const count = (current(unit).negative_images || []).length;
            said.textContent = count ? `${count} ${count === 1 ? "picture" : "pictures"} ` : "";
            clear.hidden = !count;
        }];
    }

    // --- saved references: encoded pictures by a name

    function makeSaved(unit) {
        const box = element("div", "");
        const choose = element("select", "");
        const name = element("input", "", { type: "text", maxLength: 64 });
        const seen = element("img", "ip-adapter-thumbnail", { alt: "" });
        const said = element("div", "");
        const row = element("div", "ip-adapter-row");
        const button = (textContent, title, action) => {
            const made = element("button", "ip-adapter-button", { type: "button", textContent, title });
            made.addEventListener("click", action);
            row.append(made);
            return made;
        };
        const entry = () => savedOf(unit).saved.find((each) => each.name === choose.value);
        const use = button("Use", "Add it to the unit's pictures", () => change(unit, (entries) => entries.push({ saved: choose.value })));
        const drop = button("Delete", "Delete its file", () => {
            if (confirm(`Delete the saved reference ${choose.value}?`)) askSaved(unit, { do: "delete", name: choose.value });
        });
        button("Save", "Save this unit's pictures, as the image encoder sees them, and its settings", () => {
            const wanted = name.value.trim();
            const taken = savedOf(unit).saved.some((each) => each.name === wanted);
            if (taken && !confirm(`Save over ${wanted}?`)) return;
            said.textContent = "Saving \u2026";  // the image encoder may have to be loaded
            askSaved(unit, { do: taken ? "replace" : "save", name: wanted, slot: Object.keys(current(unit)).includes("images") ? JSON.stringify(current(unit)) : "" });
        });
        const show = () => {
            const { saved, note } = savedOf(unit);
            const names = saved.map((each) => each.name);
            if (!same(names, [...choose.options].map((each) => each.value))) {
                const before = choose.value;
                choose.replaceChildren(...names.map((value) => element("option", "", { value, textContent: value })));
                choose.value = names.includes(before) ? before : names[0] ?? "";
            }
            use.disabled = drop.disabled = !choose.value;
            seen.hidden = !entry()?.uri;
            if (entry()?.uri) seen.src = entry().uri;
            if (said.innerHTML !== note) said.innerHTML = note;
        };
        choose.addEventListener("change", show);
        box.append(
            labelled(unit, { name: "saved", label: "Saved references", help: "In prompts: <ipa:name:0.7> or <ipa:name:0.7:style>." }, choose), seen,
            labelled(unit, { name: "save_as", label: "Save as", help: "Letters, digits, space, dot, dash; at most 64." }, name), row, said,
        );
        askSaved(unit, { do: "list" });
        return [box, show];
    }

    // --- compatibility: fields that make a unit compute what another program computes

    function makePresets(unit) {
        const choose = element("select", "");
        const none = element("option", "", { value: "", textContent: "its own" });
        choose.append(none, ...Object.keys(facts().presets).map((value) => element("option", "", { value, textContent: value })));
        const label = labelled(unit, { name: "preset", label: "Compute", help: "" }, choose);
        choose.addEventListener("change", () => choose.value && put(unit, facts().presets[choose.value].fields));
        return [label, () => {
            const now = current(unit);
            choose.disabled = !now.images;
            const fits = ({ fields }) => Object.entries(fields).every(([name, value]) => same(now[name], value));
            if (!fits(facts().presets[choose.value] || { fields: { images: null } }))
                choose.value = Object.keys(facts().presets).find((name) => fits(facts().presets[name])) || "";
            const preset = facts().presets[choose.value];
            label.querySelector("small").textContent = !now.images
                ? "Give the unit a picture first."
                : preset ? `What it can't make equal: ${preset.differs}.` : "Sets formulation, preparation, uncond and timing as another program has them.";
        }];
    }

    const EXTRA = {
        layers: makeBars,
        curve: (unit) => makePlot(unit, "curve"),
        hires_curve: (unit) => makePlot(unit, "hires_curve"),
    };
    const BEFORE = { Place: makeMask, Negative: makeNegatives, Saved: makeSaved, Compatibility: makePresets };

    function build(unit, place) {
        const shows = [];
        const add = (section, [made, show]) => {
            section.append(made);
            shows.push(show);
        };
        for (const name of facts().sections) {
            const section = element("fieldset", "ip-adapter-section");
            section.append(element("legend", "", { textContent: name }));
            if (BEFORE[name]) add(section, BEFORE[name](unit));
            for (const field of facts().fields.filter((each) => each.section === name)) {
                add(section, makeField(unit, field));
                if (EXTRA[field.name]) add(section, EXTRA[field.name](unit));
            }
            place.append(section);
        }
        return () => shows.forEach((show) => show());
    }

    // Which of them differ from what a unit begins with is said while they are folded.
    function mark(unit, place) {
        const names = [...facts().fields.map(({ name }) => name), "mask", "negative_images"];
        const used = names.filter((name) => current(unit)[name] !== undefined).length;
        place.querySelector("summary").dataset.used = used ? `(${used} set)` : "";
    }

    function refresh(unit) {
        const place = find(unit + "editors");
        if (!place || !gradioApp().querySelector(".ip-adapter-editors-facts")) return;
        mark(unit, place);
        if (!place.open) return;
        (drawn[unit] ??= build(unit, place))();
    }

    ipAdapter.listeners.push(refresh);
    document.addEventListener("toggle", (event) => {
        if (event.target.matches?.(".ip-adapter-editors") && event.target.open) refresh(event.target.id.replace(/editors$/, ""));
    }, true);
})();
