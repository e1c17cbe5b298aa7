"""Graph passes, their contract and the backend. Knows graphs and phase plans; no training loop."""
