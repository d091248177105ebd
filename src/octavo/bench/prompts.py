"""Beginnings of texts of many kinds, for measuring how near to each other two ways of computing a model are."""

from __future__ import annotations

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived a woman who repaired clocks.",
    "def fibonacci(n):\n    ",
    "To make a simple tomato soup, you first",
    "1, 2, 4, 8, 16, 32,",
    "The derivative of x squared is",
    "Dear Ms. Alvarez,\n\nThank you for your letter of 3 May. We regret to inform you that",
    "Photosynthesis is the process by which plants",
    "Q: Why does ice float on water?\nA:",
    "SELECT name, COUNT(*) FROM orders",
    "In 1969, two people walked on the Moon while a third",
    "Die Hauptstadt von Deutschland ist",
    "La lluvia en la ciudad",
    "# Shopping list\n\n- two onions\n- a loaf of bread\n-",
    "The committee voted seven to two against the proposal, and the chair",
    '{"name": "Ada", "born": 1815, "works": [',
    "Rain again, and the river\nrises under the old bridge;\n",
    "If a train leaves at nine and travels for three hours at eighty kilometres an hour, it",
    "import numpy as np\n\nx = np.linspace(0, 1, 100)\n",
    "The patient reported a mild headache that began on Tuesday, and the doctor",
    "A good password is long, is used in one place only, and",
    "Breaking: the storm that closed three airports on Sunday has",
    "Water boils at one hundred degrees. Explain to a child why the pot whistles:",
    "<html>\n<head><title>Garden diary</title></head>\n<body>\n",
)
