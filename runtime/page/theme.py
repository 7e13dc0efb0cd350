"""A gradio theme in the colours and fonts of the parity report, using the CSS variables of `style.css`."""

from __future__ import annotations

from gradio.themes import Base

SANS = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
PAPER, INK = (
    ("#fbfaf7", "#14161a"),
    ("#1c1e22", "#e8e6e1"),
)  # (light, dark); used before the style sheet loads

_VALUES = {
    "background_fill_primary": "var(--panel)",
    "background_fill_secondary": "var(--faint)",
    "block_background_fill": "transparent",
    "block_border_width": "0px",
    "block_info_text_color": "var(--soft)",
    "block_label_background_fill": "transparent",
    "block_label_border_width": "0px",
    "block_label_text_color": "var(--soft)",
    "block_padding": "0px",
    "block_radius": "8px",
    "block_shadow": "none",
    "block_title_text_color": "var(--ink)",
    "block_title_text_size": "0.875rem",
    "block_title_text_weight": "600",
    "body_text_color_subdued": "var(--soft)",
    "border_color_accent": "var(--quantized)",
    "border_color_primary": "var(--line)",
    "button_border_width": "1px",
    "button_large_radius": "8px",
    "button_large_text_size": "1rem",
    "button_large_text_weight": "600",
    "button_medium_radius": "8px",
    "button_primary_background_fill": "var(--ink)",
    "button_primary_background_fill_hover": "var(--ink-hover)",
    "button_primary_border_color": "transparent",
    "button_primary_text_color": "var(--paper)",
    "button_secondary_background_fill": "transparent",
    "button_secondary_background_fill_hover": "var(--faint)",
    "button_secondary_border_color": "var(--edge)",
    "button_secondary_border_color_hover": "var(--soft)",
    "button_secondary_text_color": "var(--ink)",
    "button_small_radius": "8px",
    "button_small_text_size": "0.875rem",
    "button_small_text_weight": "500",
    "checkbox_background_color": "var(--panel)",
    "checkbox_background_color_selected": "var(--ink)",
    "checkbox_border_color": "var(--soft)",
    "checkbox_border_color_selected": "var(--ink)",
    "checkbox_label_background_fill": "transparent",
    "checkbox_label_background_fill_hover": "transparent",
    "checkbox_label_background_fill_selected": "transparent",
    "checkbox_label_border_width": "0px",
    "checkbox_label_padding": "0px",
    "checkbox_label_text_color": "var(--ink)",
    "checkbox_label_text_color_selected": "var(--ink)",
    "color_accent": "var(--quantized)",
    "color_accent_soft": "var(--faint)",
    "container_radius": "8px",
    "error_background_fill": "var(--panel)",
    "error_border_color": "var(--poor)",
    "error_text_color": "var(--poor)",
    "form_gap_width": "0px",
    "input_background_fill": "var(--panel)",
    "input_background_fill_focus": "var(--panel)",
    "input_border_color": "var(--edge)",
    "input_border_color_focus": "var(--quantized)",
    "input_border_width": "1px",
    "input_padding": "12px 14px",
    "input_placeholder_color": "var(--soft)",
    "input_radius": "8px",
    "input_shadow": "none",
    "input_shadow_focus": "0 0 0 1px var(--quantized)",
    "input_text_size": "0.9375rem",
    "layout_gap": "20px",
    "link_text_color": "var(--ink)",
    "link_text_color_hover": "var(--ink)",
    "loader_color": "var(--quantized)",
    "shadow_drop": "none",
    "shadow_drop_lg": "0 6px 24px rgb(0 0 0 / 12%)",
}


def make_theme() -> Base:
    """Build the theme. Light and dark mode share all values but the body colours, since the CSS variables differ."""
    theme = Base(font=SANS, font_mono=MONO)
    for index, suffix in enumerate(("", "_dark")):
        body = {"body_background_fill": PAPER[index], "body_text_color": INK[index]}
        values = {f"{name}{suffix}": value for name, value in (_VALUES | body).items()}
        theme.set(
            **{name: value for name, value in values.items() if hasattr(theme, name)}
        )  # sizes have no dark variant
    return theme
