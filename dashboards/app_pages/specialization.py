"""Specialization."""

import streamlit as st

st.title("Specialization")
