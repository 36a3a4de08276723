"""The chat page: `octavo.ui.page` builds and mounts it, and needs gradio; the rest of the package does without."""
