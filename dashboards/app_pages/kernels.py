"""Kernels."""

import streamlit as st

st.title("Kernels")
