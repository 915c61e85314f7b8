"""Intervene."""

import streamlit as st

st.title("Intervene")
