"""The browser room: Gradio tabs, pure HTML components and Plotly figures. No arithmetic beyond formatting."""
