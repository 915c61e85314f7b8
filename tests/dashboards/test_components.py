"""The widgets as Streamlit components, in a fragment and without a browser."""

from streamlit.testing.v1 import AppTest


def _page() -> None:
    import streamlit as st

    from dashboards.shared.components import block_diagram, token_strip
    from hydra_lab.widgets import block_diagram_payload, token_strip_payload

    @st.fragment
    def draw() -> None:
        strip = token_strip_payload(["a", "</script>"], [1.0, 2.0], label="loss, nats")
        st.text(f"token {token_strip(strip, 'strip')}")
        st.text(
            f"path {block_diagram(block_diagram_payload([0], ['ssm'], [[1.0]]), 'diagram', on_select=print)}"
        )

    draw()


def test_components_run_in_a_fragment_and_again() -> None:
    app = AppTest.from_function(_page).run()
    app.run()
    assert not app.exception
    assert [text.value for text in app.text] == ["token None", "path None"]
