/* What a unit's hidden slot holds: the unit as JSON, or '' when it is off or has no picture.
   It runs in the page when a control changes, so that a slot can never be behind what the page shows. */
(enabled, pictures, model, weight, start, stop, formulation, uncond, negative, preparation) => {
    const images = (pictures ? JSON.parse(pictures) : []).map((sha256) => ({ sha256 }));
    if (!enabled || images.length === 0) {
        return "";
    }
    const unit = { version: 1, model: model || "", images, weight, start, stop, formulation, uncond };
    unit.preparation = preparation;
    if (uncond === "file") {
        unit.negative = negative || "";
    }
    return JSON.stringify(unit);
}
