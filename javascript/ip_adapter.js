/* The page's part. A unit's hidden slot (its JSON) is the truth: the visible controls write it here, in the page, so
   that it can't be behind what is shown; and when it changes from outside, they follow. */
"use strict";

var ipAdapter = (() => {
    const NAMES = ["enabled", "pictures", "model", "weight", "start", "stop", "formulation", "uncond", "negative", "preparation", "timing"];
    const DEFAULTS = { enabled: true, model: "", weight: 1, start: 0, stop: 1, formulation: "auto", uncond: "auto", negative: "", preparation: "crop", timing: "noise" };
    const [LOW, HIGH] = [-1, 2];
    const slots = {};  // by id: the text that was written or followed last
    const others = {};  // by id: fields of the unit that only the editors show; they outlive its last picture
    const listeners = [];  // called with a unit's id when it has changed
    const waiting = {};  // by the id of a unit: who gets each answer to pictures that were sent, in their order
    const shownPreviews = {};  // by the id of a unit: answers of the server by what was asked

    function parse(text) {
        try {
            const value = JSON.parse(text);
            return value && typeof value === "object" && !Array.isArray(value) ? value : null;
        } catch {
            return null;
        }
    }

    function list(text) {
        try {
            const value = JSON.parse(text || "[]");
            return Array.isArray(value) ? value : [];
        } catch {
            return [];
        }
    }

    // What the controls show of a unit. The slider's range is smaller than a request's.
    function shown(unit) {
        const full = { ...DEFAULTS, ...unit };
        full.pictures = Array.isArray(full.images) && full.images.length ? JSON.stringify(full.images) : "";
        full.weight = Math.min(HIGH, Math.max(LOW, Number(full.weight)));
        return NAMES.map((name) => full[name]);
    }

    const alike = (a, b) => a === b || ((a === null || a === undefined || a === "") && (b === null || b === undefined || b === ""));

    // A control changed: the slot's new text. What a control shows of the slot already stays as the slot has it.
    function unitText(controls, old) {
        const images = list(controls[1]);
        const base = parse(old);
        const before = base ? shown(base) : null;
        const unused = (i) => NAMES[i] === "negative" && controls[7] !== "file";
        if (before && before.every((value, i) => alike(value, controls[i]) || unused(i))) return old;
        if (images.length === 0) return "";
        const unit = { version: 1, ...(base || {}), images };
        NAMES.forEach((name, i) => {
            if (name === "pictures" || (before && name in base && alike(before[i], controls[i]))) return;
            unit[name] = name === "model" || name === "negative" ? controls[i] || "" : controls[i];
        });
        if (unit.uncond !== "file") delete unit.negative;
        return JSON.stringify(unit);
    }

    function preset(intents, controls) {
        const values = [3, 4, 5, 6, 7, 9].map((i) => controls[i]);
        return Object.keys(intents).find((name) => intents[name].every((value, i) => value === values[i])) ?? null;
    }

    function otherFields(unit) {
        return Object.fromEntries(Object.entries(unit || {}).filter(([name]) => !NAMES.includes(name) && !["version", "images"].includes(name)));
    }

    // The unit as it is, also while it has no picture and so no text.
    function current(unit) {
        const id = slotId(unit);
        return parse(slots[id]) || others[id] || {};
    }

    // Fields that no control of gradio's shows change; undefined takes one out.
    function edit(unit, changes) {
        const id = slotId(unit);
        const before = parse(slots[id]);
        const after = { ...(before || others[id]), ...changes };
        for (const name of Object.keys(changes)) if (changes[name] === undefined) delete after[name];
        others[id] = otherFields(after);
        if (before) setText(id, (slots[id] = JSON.stringify(after)));
        tell(id);
    }

    // Fields of any kind, of a unit that has pictures; the controls follow.
    function put(unit, changes) {
        const before = parse(slots[slotId(unit)]);
        if (before) setText(slotId(unit), JSON.stringify({ ...before, ...changes }));
    }

    function write(id, intents, args) {
        const controls = args.slice(0, NAMES.length);
        controls[2] = (controls[2] || "").replace(/ \(doesn't fit: [^()]*\)$/, "");  // gradio 3: the label is the value
        const old = args[NAMES.length] || "";
        const kept = !old && list(controls[1]).length && others[id] ? JSON.stringify(others[id]) : old;
        const text = unitText(controls, kept);
        slots[id] = text;
        refresh(id, controls);
        return [text, preset(intents, controls)];
    }

    // The slot changed: what the controls shall show. What this page wrote itself they show already.
    function follow(id, slot, controls) {
        if (slots[id] !== undefined && slots[id] === slot) return controls;
        slots[id] = slot;
        const unit = parse(slot);
        others[id] = otherFields(unit);
        let next = controls;
        if (unit) next = shown(unit);
        else if (!slot) next = controls.map((value, i) => (i === 1 ? "" : value));
        refresh(id, next);
        return next;
    }

    // A slot whose unit has no tab changed.
    function unseen(id, text) {
        slots[id] = text;
        refresh(id, null);
        return [];
    }

    // --- what is drawn

    const find = (id) => gradioApp().getElementById ? gradioApp().getElementById(id) : document.getElementById(id);
    const unitId = (slotId) => slotId.replace(/slot_(\d+)$/, "unit_$1_");
    const slotId = (unit) => unit.replace(/unit_(\d+)_$/, "slot_$1");
    const prefixOf = (slotId) => slotId.replace(/slot_\d+$/, "");

    function on(text) {
        const unit = parse(text);
        return unit !== null && unit.enabled !== false && (unit.images || []).length > 0;
    }

    function refresh(slotId, controls) {
        const prefix = prefixOf(slotId);
        const active = Object.keys(slots).filter((id) => prefixOf(id) === prefix && on(slots[id]));
        const units = find(prefix + "units");
        if (units) units.dataset.on = active.map((id) => id.match(/\d+$/)[0]).join(" ");
        const accordion = find(prefix + "accordion");
        const wrap = accordion && accordion.querySelector(".label-wrap");
        if (wrap) {
            let badge = wrap.querySelector(".ip-adapter-badge");
            if (!badge) {
                badge = document.createElement("span");
                badge.className = "ip-adapter-badge";
                wrap.insertBefore(badge, wrap.lastElementChild);
            }
            badge.textContent = active.length || "";
            badge.title = `${active.length} active ${active.length === 1 ? "unit" : "units"}`;
        }
        if (controls) {
            const unit = unitId(slotId);
            enable(unit, controls);
            drawSteps(unit, controls[4], controls[5], controls[10]);
            drawPictures(unit, controls);
            tell(slotId);
        }
    }

    function tell(id) {
        listeners.forEach((listener) => listener(unitId(id)));
    }

    // What applies to a unit: the server's facts of its model, and what controls need of each other (applies.py).
    const factsOf = (unit) => parse(getText(unit + "facts")) || {};

    function needed(unit, name, controls) {
        const [field, values] = factsOf(unit).needs?.[name] || [];
        return !field || values.includes(controls[NAMES.indexOf(field)]);
    }

    function enable(unit, controls) {
        const facts = factsOf(unit);
        for (const name of Object.keys(facts.needs || {})) {
            const place = find(unit + name);
            const on = needed(unit, name, controls);
            place?.classList.toggle("ip-adapter-off", !on);
            place?.querySelectorAll("input, button").forEach((each) => (each.disabled = !on));
        }
        for (const name of NAMES) {
            const values = facts.values?.[name];
            for (const option of find(unit + name)?.querySelectorAll("input[type=radio]") || []) {
                const on = !values || values.includes(option.value);
                option.disabled = !on;
                option.closest("label").classList.toggle("ip-adapter-off", !on);
                option.closest("label").title = on ? "" : "Nothing here fits the chosen model.";
            }
        }
    }

    function apply(slotId, controls) {
        enable(unitId(slotId), controls);
        tell(slotId);
        return [];
    }

    const tabOf = (id) => (id.includes("img2img") ? "img2img" : "txt2img");
    const schedules = {};  // by tab: what the server says of the steps that the host's controls describe

    function drawSteps(unit, start, stop, timing) {
        const line = find(unit + "steps");
        if (!line) return;
        line.dataset.window = JSON.stringify([start, stop, timing]);
        const { progress, exact } = schedules[tabOf(unit)] || {};
        line.textContent = "";
        if (!progress) return;
        const acting = progress
            .map((now, i) => [timing === "steps" ? i / progress.length : now, i + 1])
            .filter(([now]) => (start <= 0 || now >= start - 1e-6) && (stop >= 1 || now < stop - 1e-6))
            .map(([_, number]) => number);
        const about = exact || timing === "steps" ? "" : "about ";
        line.textContent = acting.length
            ? `Acts in ${about}steps ${acting[0]} to ${acting[acting.length - 1]} of ${progress.length}.`
            : "No step lies between start and stop.";
    }

    // Where each step of a pass begins, 0 to 1; nothing while the server hasn't said it.
    function stepsOf(unit, timing) {
        const { progress } = schedules[tabOf(unit)] || {};
        return (progress || []).map((now, i) => (timing === "steps" ? i / progress.length : now));
    }

    // The host's controls by the end of their id.
    const valueOf = (id) => find(id)?.querySelector("input:checked, input:not([type=radio])")?.value;

    function askSchedule(tab) {
        const steps = Number(valueOf(`${tab}_steps`));
        if (!isOpen(prefixIn(tab)) || !(steps >= 1)) return;
        const asked = { sampler: valueOf(`${tab}_sampling`) || "", scheduler: valueOf(`${tab}_scheduler`) || "", steps: Math.round(steps) };
        if (tab === "img2img") asked.strength = Number(valueOf("img2img_denoising_strength") ?? 1);
        const text = JSON.stringify(asked);
        if (schedules[tab]?.wanted === text) return;
        schedules[tab] = { ...schedules[tab], wanted: text };
        setText(prefixIn(tab) + "schedule_wanted", text);
    }

    function schedule(id, text) {
        const tab = tabOf(id);
        const answer = parse(text);
        if (answer && answer.asked !== schedules[tab]?.wanted) return [];
        schedules[tab] = { wanted: schedules[tab]?.wanted, ...answer };
        for (const line of gradioApp().querySelectorAll(`[id^="${prefixIn(tab)}unit_"][id$="_steps"]`))
            drawSteps(line.id.replace(/steps$/, ""), ...JSON.parse(line.dataset.window || '[0, 1, "noise"]'));
        Object.keys(slots).filter((each) => prefixOf(each) === prefixIn(tab)).forEach(tell);
        return [];
    }

    const cropOf = (entry) => (entry && entry.crop) || [0.5, 0.5, 1];
    const keyOf = (entry, preparation) => JSON.stringify([typeof entry === "string" ? entry : entry.sha256 || entry.saved || entry.data, cropOf(entry), preparation]);

    function setText(id, text) {
        const box = find(id)?.querySelector("textarea, input");
        if (!box) return;
        box.value = text;
        box.dispatchEvent(new Event("input", { bubbles: true }));
    }

    const getText = (id) => find(id)?.querySelector("textarea, input")?.value || "";

    function change(unit, edit) {
        const entries = list(getText(unit + "hashes")).map((each) => (typeof each === "string" ? { data: each } : { ...each }));
        edit(entries);
        setText(unit + "hashes", entries.length ? JSON.stringify(entries) : "");
    }

    function element(tag, className, properties) {
        return Object.assign(document.createElement(tag), { className }, properties);
    }

    function drawPictures(unit, controls) {
        const place = find(unit + "list");
        if (!place) return;
        const entries = list(controls[1]);
        const preparation = controls[9];
        const cropped = needed(unit, "crop", controls);
        const known = shownPreviews[unit] || {};
        place.classList.toggle("ip-adapter-cropped", cropped);
        while (place.children.length > entries.length) place.lastChild.remove();
        entries.forEach((entry, index) => {
            let card = place.children[index];
            if (!card) place.append((card = makeCard(unit, index)));
            const answer = known[keyOf(entry, preparation)];
            const image = card.querySelector("img");
            if (answer && answer.uri) {
                if (image.src !== answer.uri) image.src = answer.uri;
            } else if (answer) image.removeAttribute("src");
            image.alt = answer && answer.problem ? answer.problem : `Picture ${index + 1} as the encoder sees it`;
            card.querySelector(".ip-adapter-problem").textContent = (answer && answer.problem) || "";
            const weight = card.querySelector(".ip-adapter-weight");
            if (document.activeElement !== weight) weight.value = entry.weight ?? 1;
            card.querySelectorAll("input[type=range]").forEach((slider, i) => {
                if (document.activeElement !== slider) slider.value = cropOf(entry)[i];
                slider.disabled = !cropped;
            });
        });
    }

    function makeCard(unit, index) {
        const card = element("div", "ip-adapter-card");
        const image = element("img", "", { draggable: false, title: "Exactly what the image encoder sees. Drag to move the crop." });
        const edit = (change_) => change(unit, (entries) => change_(entries[index], entries));
        const crop = (values) => edit((entry) => {
            entry.crop = values.map((value, i) => Math.min([1, 1, 10][i], Math.max([0, 0, 1][i], Math.round(value * 1000) / 1000)));
        });
        let from = null;
        image.addEventListener("pointerdown", (event) => {
            if (!find(unit + "list").classList.contains("ip-adapter-cropped")) return;
            image.setPointerCapture(event.pointerId);
            from = [event.clientX, event.clientY, ...cropOf(list(getText(unit + "hashes"))[index])];
        });
        image.addEventListener("pointerup", (event) => {
            if (!from) return;
            const [x, y, left, top, zoom] = from;
            from = null;
            if (x !== event.clientX || y !== event.clientY)
                crop([left - (event.clientX - x) / image.clientWidth / zoom, top - (event.clientY - y) / image.clientHeight / zoom, zoom]);
        });
        const row = element("div", "ip-adapter-row");
        const button = (text, title, action) => {
            const made = element("button", "ip-adapter-button", { type: "button", textContent: text, title });
            made.addEventListener("click", action);
            row.append(made);
        };
        const swap = (entries, to) => {
            if (to >= 0 && to < entries.length) [entries[index], entries[to]] = [entries[to], entries[index]];
        };
        button("<", "Move left", () => edit((_, entries) => swap(entries, index - 1)));
        button(">", "Move right", () => edit((_, entries) => swap(entries, index + 1)));
        button("\u2715", "Remove this picture from the unit", () => edit((_, entries) => entries.splice(index, 1)));
        button("Forget", "Take it out, and delete the copy that is kept of it", () => edit((entry, entries) => {
            if (!confirm("Delete the copy of this picture? Parameters will not bring it back then.")) return;
            setText(unit + "forget", "");
            setText(unit + "forget", entry.sha256 || "");
            entries.splice(index, 1);
        }));
        const weight = element("input", "ip-adapter-weight", { type: "number", min: -5, max: 5, step: 0.05, title: "Weight of this picture, -5 to 5; multiplies the unit's strength" });
        weight.addEventListener("change", () => edit((entry) => {
            entry.weight = Math.min(5, Math.max(-5, weight.value === "" ? 1 : Number(weight.value)));
        }));
        row.append(weight);
        const details = element("details", "ip-adapter-crop");
        details.append(element("summary", "", { textContent: "Crop" }));
        ["x", "y", "zoom"].forEach((name, i) => {
            const slider = element("input", "", { type: "range", min: i === 2 ? 1 : 0, max: i === 2 ? 10 : 1, step: 0.01, title: ["Left to right, 0 to 1", "Top to bottom, 0 to 1", "Zoom, 1 to 10"][i] });
            slider.dataset.crop = name;
            slider.addEventListener("change", () => crop([...details.querySelectorAll("input")].map((each) => Number(each.value))));
            details.append(slider);
        });
        card.append(image, element("div", "ip-adapter-problem"), row, details);
        return card;
    }

    // Saved references, by tab: asked for by the editors, told to them as listeners.
    const savedIn = {};

    function askSaved(unit, wish) {
        setText(prefixIn(tabOf(unit)) + "saved_wanted", JSON.stringify({ ...wish, asked: Date.now() }));
    }

    const savedOf = (unit) => savedIn[tabOf(unit)] || { saved: [], note: "" };

    function savedTold(id, text) {
        savedIn[tabOf(id)] = parse(text);
        for (const each of gradioApp().querySelectorAll(`[id^="${prefixIn(tabOf(id))}unit_"][id$="_list"]`))
            listeners.forEach((listener) => listener(each.id.replace(/list$/, "")));
        return [];
    }

    // The server's answers: the encoder's inputs, in the order of the unit's pictures.
    function previews(slotId, text, controls) {
        const unit = unitId(slotId);
        shownPreviews[unit] = Object.fromEntries(list(text).map((each) => [keyOf(each, each.preparation), each]));
        drawPictures(unit, controls);
        return [];
    }

    // Pictures that the server has taken go to who sent them: join those of the unit, mostly.
    function join(slotId, text) {
        const unit = unitId(slotId);
        const answer = parse(text);
        if (answer) (waiting[unit]?.shift() || ((hashes) => addPictures(unit, hashes)))(answer.hashes);
        return [];
    }

    function addPictures(unit, hashes) {
        if (hashes.length) change(unit, (entries) => entries.push(...hashes.map((sha256) => ({ sha256 }))));
    }

    // --- pictures from elsewhere in the page

    function asDataUri(blob) {
        return new Promise((done, failed) => {
            const reader = new FileReader();
            reader.onload = () => done(reader.result);
            reader.onerror = () => failed(reader.error);
            reader.readAsDataURL(blob);
        });
    }

    // Files, blobs or addresses of pictures go to the server in one message, so that none overtakes another. What it
    // keeps of them, hashes and the data URIs, is taken by ``taker``.
    async function give(unit, sources, taker = (hashes) => addPictures(unit, hashes)) {
        const sent = sources.map(async (source) => {
            const blob = typeof source === "string" ? await (await fetch(source)).blob() : source;
            const name = blob.name || "The picture";
            // what is no picture for the browser either isn't read: the server says what it is
            return { name, data: blob.type && !blob.type.startsWith("image/") ? "data:," : await asDataUri(blob) };
        });
        const files = await Promise.all(sent);
        const text = JSON.stringify(files);
        (waiting[unit] ??= []).push((hashes) => taker(hashes, files.map((file) => file.data)));
        setText(unit + "incoming", "");
        setText(unit + "incoming", text);
    }

    const prefixIn = (tab) => `script_${tab}_ipadapter_`;

    function firstFree(prefix) {
        const units = [...gradioApp().querySelectorAll(`[id^="${prefix}unit_"][id$="_list"]`)].map((each) => each.id.replace(/list$/, ""));
        return units.find((unit) => !getText(unit + "hashes")) || units[units.length - 1];
    }

    function openTab(tab) {
        window[`switch_to_${tab}`]?.();  // the host's, which knows what its tabs are called
        const box = find(prefixIn(tab) + "accordion-visible-checkbox");
        if (box && !box.checked) box.click();
        find(prefixIn(tab) + "accordion")?.scrollIntoView({ block: "center" });
    }

    function send(tab, picture) {
        if (!picture || !picture.src) return;
        const unit = firstFree(prefixIn(tab));
        if (!unit) return;
        give(unit, [picture.src]);
        openTab(tab);
        const number = Number(unit.match(/unit_(\d+)_$/)[1]);
        gradioApp().querySelectorAll(`#${prefixIn(tab)}units > .tab-nav > button`)[number - 1]?.click();
    }

    const selected = (gallery) =>
        gradioApp().querySelector(`#${gallery} .preview > img, #${gallery} .preview .media-button img, #${gallery} .thumbnail-item.selected img`) ||
        gradioApp().querySelector(`#${gallery} img`);

    const BUTTONS = [
        ["txt2img", ["#image_buttons_txt2img .form", "#image_buttons_txt2img", "#txt2img_results"], () => selected("txt2img_gallery")],
        ["img2img", ["#image_buttons_img2img .form", "#image_buttons_img2img", "#img2img_results"], () => selected("img2img_gallery")],
        ["img2img", ["#img2img_copy_to_img2img", "#img2img_settings"], () => gradioApp().querySelector("#img2img_image img[src]")],
        ["txt2img", ["#tab_pnginfo .image-buttons", "#tab_pnginfo :has(> #txt2img_tab)", "#tab_pnginfo"], () => gradioApp().querySelector("#pnginfo_image img[src]")],
    ];

    function addButtons() {
        BUTTONS.forEach(([tab, places, picture], i) => {
            if (find(`ip_adapter_send_${i}`)) return;
            const place = places.map((each) => gradioApp().querySelector(each)).find(Boolean);
            if (!place || !find(prefixIn(tab) + "accordion")) return;
            const made = element("button", "ip-adapter-send", { type: "button", id: `ip_adapter_send_${i}`, textContent: "Send to IP-Adapter", title: "Use the picture as a reference in the first unit without one" });
            made.addEventListener("click", () => send(tab, picture()));
            place.append(made);
        });
    }

    let pointed = null;  // the unit under the pointer

    const unitAt = (target) => target?.closest?.(".ip-adapter-unit")?.querySelector(".ip-adapter-list")?.id.replace(/list$/, "");

    document.addEventListener("pointerover", (event) => (pointed = unitAt(event.target) || null));
    document.addEventListener("paste", (event) => {
        const files = [...(event.clipboardData?.files || [])].filter((file) => file.type.startsWith("image/"));
        if (!files.length || !pointed) return;
        event.preventDefault();
        event.stopPropagation();
        give(pointed, files);
    }, true);
    document.addEventListener("dragover", (event) => {
        const types = [...event.dataTransfer.types];
        if (unitAt(event.target) && (types.includes("Files") || types.includes("text/uri-list"))) event.preventDefault();
    });
    document.addEventListener("drop", (event) => {
        const unit = unitAt(event.target);
        const files = [...event.dataTransfer.files];
        const address = event.dataTransfer.getData("text/uri-list").split("\n")[0];
        if (!unit || !(files.length || address)) return;
        event.preventDefault();
        event.stopPropagation();
        give(unit, files.length ? files : [address]);
    });
    document.addEventListener("change", (event) => {
        if (!event.target.matches?.(".ip-adapter-drop input")) return;
        give(unitAt(event.target), [...event.target.files]);
        event.target.value = "";  // the same file may be chosen again
    });
    const askSchedules = () => ["txt2img", "img2img"].forEach(askSchedule);

    document.addEventListener("input", () => setTimeout(askSchedules));
    if (typeof onAfterUiUpdate === "function") onAfterUiUpdate(askSchedules);

    // The checkpoint may be another one than when the models were listed: asked when the accordion opens, when a
    // model is about to be chosen, and when the host says that its settings changed.
    const isOpen = (prefix) => Boolean(find(prefix + "accordion")?.querySelector(".ip-adapter-unit")?.offsetParent);

    function look(prefix) {
        setText(prefix + "look", String(Date.now()));
    }

    function follows(prefix) {
        const accordion = find(prefix + "accordion");
        accordion?.querySelector(".label-wrap")?.addEventListener("click", () => setTimeout(() => {
            if (isOpen(prefix)) look(prefix);
            askSchedules();
        }));
        accordion?.addEventListener("focusin", (event) => event.target.closest('[id$="_model"]') && look(prefix));
        if (typeof onOptionsChanged === "function") onOptionsChanged(() => isOpen(prefix) && look(prefix));
    }

    if (typeof onUiUpdate === "function") onUiUpdate(addButtons);
    if (typeof onUiLoaded === "function")
        onUiLoaded(() => {
            for (const each of gradioApp().querySelectorAll(".ip-adapter-list")) {
                const unit = each.id.replace(/list$/, "");
                enable(unit, shown({}));
                drawSteps(unit, 0, 1, "noise");
            }
            for (const tab of ["txt2img", "img2img"]) follows(prefixIn(tab));
            addButtons();
        });

    return {
        unitText, shown, write, follow, unseen, apply, schedule, previews, join, savedTold,  // what gradio's events call
        element, find, current, edit, put, give, stepsOf, factsOf, askSaved, savedOf, change, listeners,  // for the editors
    };
})();
