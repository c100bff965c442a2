"""What a person looks at.

Every figure takes a frame; one style, one palette, the same colour for a component everywhere. `study` asks the whole
question of one model and one task, and the report puts what it found on one page."""

from vitplast._door import door

__all__ = door(
    __name__,
    figures=(
        "COLOURS KIND_LINES MARKERS THEORY_ORDER against_accuracy as_svg draw_depth "
        "contact_sheet depth_lines differences draw_boxes draw_loss draw_rate end_labels "
        "image_rows keep_headline legend_above log_y mean_ranks measurement over_targets "
        "panels training_curves"
    ),
    places="PlaceExplorer advice_html as_map map_grid place_maps",
    mistakes="mistaken_pairs mistakes predictions_html",
    study="REAL_STUDY Study StudyConfig study summary",
    console="edges_text plan_text study_json study_text sweep_text",
    scales="SCALES Scale Caption at_scale counted",
    report="FOOTNOTE difference_noise display_frame findings report_html text_table",
)
