"""Workspace."""

import streamlit as st

st.title("Workspace")
