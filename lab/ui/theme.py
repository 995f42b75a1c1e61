"""The Gradio theme: the lab's colours on Gradio's own widgets. Everything else is assets/css/lab.css."""
from __future__ import annotations

import gradio as gr

SANS = ["Inter", "system-ui", "-apple-system", "Segoe UI", "Helvetica", "sans-serif"]
MONO = ["JetBrains Mono", "ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def theme() -> gr.themes.Base:
    """Hairlines, one accent, no gradients, no shadows; fonts the machine already has."""
    base = gr.themes.Base(font=SANS, font_mono=MONO, radius_size="sm", spacing_size="md", text_size="sm")
    pairs = {
        "body_background_fill": ("#fbfbfa", "#14161a"), "body_text_color": ("#1b1d22", "#e8e9ec"),
        "body_text_color_subdued": ("#5c6270", "#9aa1ae"), "background_fill_primary": ("#ffffff", "#1c1f25"),
        "background_fill_secondary": ("#fbfbfa", "#14161a"), "border_color_primary": ("#e3e4e8", "#2c3038"),
        "border_color_accent": ("#2f5fd0", "#86a8ff"), "color_accent": ("#2f5fd0", "#86a8ff"),
        "color_accent_soft": ("#eef2fc", "#232a3a"), "block_background_fill": ("#ffffff", "#1c1f25"),
        "block_border_color": ("#e3e4e8", "#2c3038"), "block_label_text_color": ("#5c6270", "#9aa1ae"),
        "input_background_fill": ("#ffffff", "#1c1f25"), "input_border_color": ("#e3e4e8", "#2c3038"),
        "input_border_color_focus": ("#2f5fd0", "#86a8ff"), "input_placeholder_color": ("#7a808d", "#7f8794"),
        "button_primary_background_fill": ("#2f5fd0", "#86a8ff"),
        "button_primary_background_fill_hover": ("#284fb0", "#9bb8ff"), "button_primary_text_color": ("#ffffff", "#10131a"),
        "button_primary_border_color": ("#2f5fd0", "#86a8ff"), "button_secondary_background_fill": ("#ffffff", "#1c1f25"),
        "button_secondary_background_fill_hover": ("#f3f4f6", "#252931"),
        "button_secondary_text_color": ("#1b1d22", "#e8e9ec"), "button_secondary_border_color": ("#e3e4e8", "#2c3038"),
        "panel_background_fill": ("#fbfbfa", "#14161a"), "link_text_color": ("#2f5fd0", "#86a8ff"),
    }
    values: dict[str, str] = {}
    for name, (light, dark) in pairs.items():
        values[name], values[f"{name}_dark"] = light, dark
    accent = {name for name in values if name.startswith("color_accent") and name.endswith("_dark")}
    for name in accent - {"color_accent_soft_dark"}:
        values.pop(name)  # Gradio has no dark pair for the accent itself; lab.css sets it
    return base.set(**values, block_shadow="none", block_border_width="0px", button_border_width="1px",
                    button_primary_shadow="none", button_secondary_shadow="none", input_shadow="none",
                    input_shadow_focus="none", layout_gap="16px", block_padding="0px")
